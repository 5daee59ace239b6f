"""Policy and reference: how they are loaded, and how they score responses."""
