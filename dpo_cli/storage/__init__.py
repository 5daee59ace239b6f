"""How things get onto a disk, once: whole files, logs of lines, locks."""
