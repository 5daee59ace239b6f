"""What metrics are called, on the console and on every page, by their names in metrics.jsonl and report.json."""

METRICS = (  # label, name
    ("accuracy", "rewards/accuracies"),
    ("margin", "rewards/margins"),
    ("loss", "loss"),
    ("loss, lower than at the start by", "loss/improvement"),
    ("reward of chosen", "rewards/chosen"),
    ("reward of rejected", "rewards/rejected"),
    ("log-prob change of chosen, nats a token", "logps_change_per_token/chosen"),
    ("log-prob change of rejected, nats a token", "logps_change_per_token/rejected"),
    ("chosen more likely than rejected, by the policy", "accuracy_without_reference/policy"),
    ("chosen more likely than rejected, by the reference", "accuracy_without_reference/reference"),
)
MAIN = METRICS[:3]  # what a table shows that has little room
SAMPLES = (  # label, metric of the policy's answers, metric of the reference's
    ("KL(policy || reference), nats a response", "samples/kl", None),
    ("length, tokens", "samples/length", "samples/reference_length"),
    ("length, of the reference's", "samples/length_ratio", None),
    ("share that ends by itself", "samples/ends", "samples/reference_ends"),
    ("repeated 4-grams within an answer", "samples/repetition", "samples/reference_repetition"),
    ("distinct 2-grams of all 2-grams", "samples/distinct_2", "samples/reference_distinct_2"),
)
SCALES = (*MAIN, ("KL", "samples/kl"), ("length", "samples/length_ratio"))  # of a policy at a scale of its adapter
