"""dpo-cli: preference-tune a language model with Direct Preference Optimization.

Read `training/runner.py` first: it is the whole run. The journey of one preference pair is

    row -> PreferencePair -> TokenizedPair -> Batch -> PairLogps -> LogRatios -> losses -> metrics -> record

and a module imports only from the floors below its own: cli, then training, evaluation, models,
data and config, and at the ground theory, console and errors.
"""

__version__ = "0.1.0"
