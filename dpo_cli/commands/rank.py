"""dpo-rank: a Bradley-Terry ranking of players or models, with standard errors and intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.commands.on_ranks import on_every_rank
from dpo_cli.config.schema import RankConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import cut_apart, plural, safe_text, significant
from dpo_cli.data.files import local_path
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.games import GREATEST_COUNT, LEAST_COUNT, Games, read_games
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.labelling.match import Match, play
from dpo_cli.storage.durable import write_whole
from dpo_cli.storage.job_log import output_path
from dpo_cli.theory import bradley_terry
from dpo_cli.theory.bradley_terry import Fit, Groups, NoMaximumError
from dpo_cli.theory.statistics import Estimate, mean_estimate

REMEDY = "set prior=1, which adds a tie of every player with an average player"
LONGEST_NAME = 14  # characters of a name in a table, which then fits 80 columns
LONGEST_HEADING = 5  # characters: in place of longer names the matrix has ranks as headings
MATRIX_PLAYERS = 12  # more columns do not fit a screen
SHOWN_IN_MESSAGE = 6  # names and groups


def rank(config: RankConfig, reporter: Reporter) -> Fit:
    """Rank the players of a file of games, or checkpoints by what a judge says of their completions."""
    with on_every_rank(config, reporter) as (engine, reporter, signals):
        output = engine.same(lambda: _output(config)) if config.output is not None else None
        if config.games is not None:
            path = local_path(config.games)
            if path is None:
                raise DataError(f"{safe_text(config.games)}: no such file; name a local file of games")
            table = read_games(path)
            players, wins = [*table.players], table.wins
            fit = rank_games(path, table, config.prior, reporter)
        else:
            kept = output.with_name(f"{output.stem}.answers.jsonl") if output is not None else None
            match = play(config, kept, reporter, engine, signals)
            show_match(match, reporter)
            if kept is not None:
                reporter.facts([("completions", str(kept))])
            players, wins = match.players, match.tables.sum(0)
            fit = rank_match(str(config.prompts), match, config.prior, reporter)
        if output is not None:
            engine.same(lambda: write_ranking(output, players, wins, fit))
            reporter.facts([("ranking", str(output))])
    return fit


def _output(config: RankConfig) -> Path:
    """The file of the ranking; ConfigError where another kind of file exists there."""
    output = output_path(str(config.output), ".json")
    if not output.exists():
        return output
    try:
        found = json.loads(output.read_bytes()) if output.is_file() else None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "log_strengths" not in found:
        raise ConfigError(f"output={safe_text(output)}: already exists and is not a ranking; name another file")
    return output


def show_match(match: Match, reporter: Reporter) -> None:
    """Print each model's mean reward, the difference to the first model's, and the mean length."""
    rows = []
    for player, name in enumerate(match.players):
        mean = mean_estimate([rewards[player] for rewards in match.rewards])
        more = mean_estimate([rewards[player] - rewards[0] for rewards in match.rewards])
        tokens = sum(row[player] for row in match.tokens) / len(match.tokens)
        rows.append([safe_text(name), _interval(mean), _interval(more) if player else "", significant(tokens)])
    reporter.say()
    reporter.grid(["model", "mean reward (95%)", "minus the first (95%)", "tokens"], rows)
    cut = sum(sample.finish_reasons.count(FinishReason.LENGTH) for sample in match.samples)
    if cut:
        number = plural(sum(map(len, match.tokens)), "completion")
        reporter.say(f"{cut:,} of {number} stopped at max_new_tokens (finish_reason length)")
    tied = sum(len(set(rewards)) < len(rewards) for rewards in match.rewards)
    if tied:
        reporter.say(f"{plural(tied, 'prompt')} with equal rewards: a tie is half a win for each")
    reporter.say()


def _interval(estimate: Estimate) -> str:
    low, high = significant(estimate.low), significant(estimate.high)
    return f"{significant(estimate.mean)} ({low}, {high})"


def rank_games(games: Path, table: Games, prior: float, reporter: Reporter) -> Fit:
    """Fit strengths to the games of a file and show the ranking; DataError where no ranking exists."""
    if table.ignored:
        ignored = safe_text(", ".join(table.ignored), limit=120)
        reporter.warn(f"{games}: columns not used: {ignored}. A row has winner, loser, count and tie")
    fit = fit_players(str(games), table.players, table.wins, prior)
    total = float(table.wins.sum())
    number = f"{_number(total)} {'game' if total == 1 else 'games'}"
    reporter.say(f"{games}: {number} between {plural(len(table.players), 'player')}")
    show_ranking(table.players, table.wins, fit, reporter)
    return fit


def rank_match(prompts: str, match: Match, prior: float, reporter: Reporter) -> Fit:
    """Fit strengths to a match and show the ranking; DataError where no ranking exists."""
    tables = match.tables
    if bool((tables == tables[0]).all()):
        reporter.warn(
            "every prompt has the same result, so the intervals, which measure how prompts differ, are too narrow"
        )
    fit = fit_players(prompts, match.players, tables.sum(0), prior, tables)
    show_ranking(match.players, tables.sum(0), fit, reporter)
    return fit


def fit_players(
    source: str, names: Sequence[str], wins: Tensor, prior: float = 0.0, clusters: Tensor | None = None
) -> Fit:
    """Fit with `bradley_terry.fit`; DataError where no maximum exists, with the players that are the reason."""
    if prior != 0 and not LEAST_COUNT <= prior <= GREATEST_COUNT:
        raise ConfigError(f"prior={prior:g}: must be 0 or from {LEAST_COUNT:g} to {GREATEST_COUNT:g} games; 1 is usual")
    if clusters is not None and len(clusters) < 2:
        raise DataError(f"{safe_text(source)}: has one prompt, and intervals need two; use more prompts")
    try:
        return bradley_terry.fit(wins, prior, clusters)
    except NoMaximumError as error:
        raise DataError(f"{safe_text(source)}: {_no_maximum(error, names)}; {REMEDY}") from None


def _no_maximum(error: NoMaximumError, names: Sequence[str]) -> str:
    if error.apart:
        groups = [_listed([group], names) for group in error.apart[:SHOWN_IN_MESSAGE]]
        more = len(error.apart) - len(groups)
        shown = " | ".join(groups + ([f"{more:,} more"] if more else []))
        return f"no game connects these groups, so their strengths cannot be compared: {shown}"
    above, below = (sum(map(len, groups)) for groups in (error.undefeated, error.winless))
    undefeated = f"{_listed(error.undefeated, names)} never lost to the others"
    winless = f"{_listed(error.winless, names)} never beat the others"
    if above + below < len(names):
        return f"{undefeated} and {winless}, so their strengths have no bound"
    # Each implies the other: name the shorter list.
    return f"{winless if below < above else undefeated}, so their strength has no bound"


def _listed(groups: Groups | list[tuple[int, ...]], names: Sequence[str]) -> str:
    """`Anna`, `Anna and Bert`, `Anna, Bert, Carl, Dora, Emil and 9 others`."""
    members = [safe_text(names[player], limit=40) for player in sorted(player for group in groups for player in group)]
    if len(members) > SHOWN_IN_MESSAGE:
        members[SHOWN_IN_MESSAGE - 1 :] = [f"{len(members) - SHOWN_IN_MESSAGE + 1:,} others"]
    return " and ".join([", ".join(members[:-1]), members[-1]] if len(members) > 1 else members)


def show_ranking(names: Sequence[str], wins: Tensor, fit: Fit, reporter: Reporter) -> None:
    """Print the ranking, the matrix of win probabilities, and how well one strength per player fits the games."""
    order = _best_first(fit)
    if fit.prior > 0:
        ties = f"{fit.prior:g} {'tie' if fit.prior == 1 else 'ties'}"
        reporter.say(f"prior={fit.prior:g} adds {ties} of every player with an imaginary average player")
    if fit.clusters is not None:
        reporter.say(
            f"intervals are over {plural(fit.clusters, 'prompt')}, not games: games of one prompt share their responses"
        )
    if any(len(name) > LONGEST_NAME for name in map(safe_text, names)):
        reporter.facts([(str(rank), safe_text(names[player], 200)) for rank, player in enumerate(order, start=1)])
    reporter.say()
    _show_players(order, names, wins, fit, reporter)
    reporter.say()
    _show_matrix(order, names, fit, reporter)
    if fit.degrees_of_freedom > 0:
        reporter.say()
        _show_goodness(fit, reporter)


def _best_first(fit: Fit) -> list[int]:
    strengths = fit.log_strengths.tolist()
    return sorted(range(len(strengths)), key=lambda player: -strengths[player])


def _show_players(order: list[int], names: Sequence[str], wins: Tensor, fit: Fit, reporter: Reporter) -> None:
    games = (wins + wins.mT).sum(1)
    low, high = fit.interval()
    least, most = fit.win_probability_interval()
    rows, all_apart = [], True
    shown = cut_apart(names, LONGEST_NAME)
    for rank, player in enumerate(order, start=1):
        against_next, apart = "", True
        if rank < len(order):
            pair = player, order[rank]
            apart = float(least[pair]) > 0.5
            ends = f"({_percent(least[pair])}, {_percent(most[pair])})"
            against_next = f"{_percent(fit.win_probabilities[pair])} {ends}"
            all_apart &= apart
        rows.append(
            [
                str(rank),
                shown[player],
                f"{_nats(fit.log_strengths[player])} ({_nats(low[player])}, {_nats(high[player])})",
                _nats(fit.standard_errors[player]),
                _number(float(games[player])),
                _number(float(wins[player].sum())),
                against_next,
                "" if apart else "~",
            ]
        )
    reporter.grid(["", "player", "log strength (95%)", "s.e.", "games", "wins", "% beats next", ""], rows, left=2)
    if not all_apart:
        reporter.say("~ the 95% interval of % beats next contains 50", style="dim")


def _show_matrix(order: list[int], names: Sequence[str], fit: Fit, reporter: Reporter) -> None:
    if len(order) > MATRIX_PLAYERS:
        reporter.say(f"win probabilities are not shown for more than {MATRIX_PLAYERS} players")
        return
    cut = cut_apart(names, LONGEST_NAME)
    shown = [cut[player] for player in order]
    short = all(len(name) <= LONGEST_HEADING for name in shown)
    headings = shown if short else [str(rank) for rank in range(1, len(order) + 1)]
    rows = []
    for rank, (player, name) in enumerate(zip(order, shown, strict=True), start=1):
        against = ["-" if other == player else _percent(fit.win_probabilities[player, other]) for other in order]
        rows.append([str(rank), name, *against])
    reporter.grid(["", "% row beats column", *headings], rows, left=2)


def _show_goodness(fit: Fit, reporter: Reporter) -> None:
    of_freedom = f"{plural(fit.degrees_of_freedom, 'degree')} of freedom"
    line = f"fit: deviance {significant(fit.deviance)}, chi-square {significant(fit.chi_square)} on {of_freedom}"
    if fit.p_value is None:
        why = "a prior changes both" if fit.prior > 0 else "games of one prompt are not independent"
        reporter.say(f"{line}; no p-value, because {why}")
        return
    reporter.say(f"{line}, p = {significant(fit.p_value, 2)}")
    if fit.p_value < 0.05:
        reporter.warn(
            "one strength per player does not fit these games: results depend on who plays whom, for instance A beats "
            "B, B beats C and C beats A; compare the games of each two players, not their ranks"
        )


def _percent(probability: Tensor) -> str:
    """Whole percents; never 0 or 100, which no number of games can prove."""
    percent = 100 * float(probability)
    return "<1" if percent < 0.5 else ">99" if percent >= 99.5 else f"{percent:.0f}"


def _nats(value: Tensor) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def _number(value: float) -> str:
    """`8`, `2.5`, `12,000`."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def write_ranking(path: Path, names: Sequence[str], wins: Tensor, fit: Fit) -> None:
    """Write the fit as JSON, best players first in every list and table; StorageError where that fails."""
    order = torch.tensor(_best_first(fit))

    def ranked(table: Tensor) -> Any:
        return table[order][:, order].tolist()

    content = {
        "names": [names[player] for player in order.tolist()],
        "log_strengths": fit.log_strengths[order].tolist(),
        "standard_errors": fit.standard_errors[order].tolist(),
        "intervals95": torch.stack(fit.interval(), -1)[order].tolist(),
        "strengths": fit.strengths[order].tolist(),
        "covariance": ranked(fit.covariance),
        "wins": ranked(wins),
        "win_probabilities": ranked(fit.win_probabilities),
        "win_probability_intervals95": ranked(torch.stack(fit.win_probability_interval(), -1)),
        "deviance": fit.deviance,
        "chi_square": fit.chi_square,
        "degrees_of_freedom": fit.degrees_of_freedom,
        "p_value": fit.p_value,
        "prior": fit.prior,
        "clusters": fit.clusters,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None
