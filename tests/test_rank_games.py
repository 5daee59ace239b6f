"""Games from a file to a ranking: what a row may say, what is refused, and what a user reads at the end."""

import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl

from dpo_cli.commands.rank import fit_players, rank_games, show_ranking, write_ranking
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.games import read_games
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.theory.bradley_terry import fit

WORKED = "winner,loser,count\nA,B,8\nB,A,4\nA,C,3\nC,A,5\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have short names in messages, and the screen 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def games(text: str, name: str = "games.csv") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def shown(file: Path, prior: float = 0.0) -> str:
    stream = io.StringIO()
    rank_games(file, read_games(file), prior, Reporter(stream))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def refused(file: Path, prior: float = 0.0) -> str:
    with pytest.raises(DataError) as error:
        rank_games(file, read_games(file), prior, Reporter(io.StringIO()))
    return str(error.value)


# Reading


def test_rows_of_one_pair_add_up_and_players_keep_the_order_in_which_they_come() -> None:
    read = read_games(games("winner,loser,count\nBert,Anna,2\nAnna,Carl,1\nBert,Anna,0.5\nAnna,Bert,3\nCarl,Bert,0\n"))
    assert read.players == ("Bert", "Anna", "Carl")
    assert read.wins.tolist() == [[0, 2.5, 0], [3, 0, 1], [0, 0, 0]]
    assert read.wins.dtype == torch.float64 and read.ignored == ()


def test_a_row_without_a_count_is_one_game() -> None:
    assert read_games(games("winner,loser\nA,B\nB,A\nA,B\n")).wins.tolist() == [[0, 2], [1, 0]]


@pytest.mark.parametrize("yes", ["true", "True", "1", "yes", " YES "])
def test_a_tie_is_half_a_win_for_each_side_of_every_game_of_its_row(yes: str) -> None:
    # 1 win, then 3 drawn games: 1 + 3/2 to 3/2
    read = read_games(games(f"winner,loser,count,tie\nA,B,1,\nA,B,3,{yes}\nB,A,2,no\nB,A,1,0\nB,A,1,false\n"))
    assert read.wins.tolist() == [[0, 1 + 3 / 2], [2 + 1 + 1 + 3 / 2, 0]]


def test_every_kind_of_file_holds_the_same_games() -> None:
    rows: list[dict[str, Any]] = [{"winner": "A", "loser": "B", "count": 2.5}, {"winner": "B", "loser": "A"}]
    lines = write_jsonl(Path("a.jsonl"), [rows[0], {**rows[1], "tie": True}])
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    # as a table with empty cells gives them
    Path("a.json").write_text(json.dumps([{**rows[0], "tie": None}, {**rows[1], "tie": 1.0}]))
    games("winner,loser,count,tie\nA,B,2.5,\nB,A,1,yes\n", "a.csv")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv"):
        read = read_games(Path(name))
        assert (read.players, read.wins.tolist()) == (("A", "B"), [[0, 3], [0.5, 0]]), name


def test_spaces_around_a_name_make_no_other_player() -> None:
    assert read_games(games("winner,loser\n A,B \nB, A \n")).players == ("A", "B")


COUNT = "'count' must be 0 or a number from 0.001 to 1e+09, it is"
TIE = "'tie' must be true or false, yes or no, 1 or 0, it is"
NEEDS = "A row needs winner and loser, and may have count and tie; it has"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("won,lost\nA,B\n", f"games.csv line 2: no 'winner'. {NEEDS} won, lost"),
        ("winner,lost\nA,B\n", f"games.csv line 2: no 'loser'. {NEEDS} winner, lost"),
        (
            "winner,loser,count\nA,B,1\nA,B,1,000\n",
            "games.csv line 3: has 1 cell more than the header; quote a text that contains a comma",
        ),
        ("winner,loser\nA,B\nB\n", f"games.csv line 3: no 'loser'. {NEEDS} winner"),
        ("winner,loser\nA,B\n,B\n", "games.csv line 3: 'winner' is empty; a player needs a name"),
        ("winner,loser\nA,  \n", "games.csv line 2: 'loser' is empty; a player needs a name"),
        ("winner,loser\nA,B\nA,A\n", "games.csv line 3: 'A' plays against itself; a game needs two players"),
        (
            "winner,loser\n\x1b[2J,\x1b[2J\n",
            "games.csv line 2: '\\x1b[2J' plays against itself; a game needs two players",
        ),
        ("winner,loser,count\nA,B,-1\n", f"games.csv line 2: {COUNT} '-1'"),
        ("winner,loser,count\nA,B,nan\n", f"games.csv line 2: {COUNT} 'nan'"),
        ("winner,loser,count\nA,B,inf\n", f"games.csv line 2: {COUNT} 'inf'"),
        ("winner,loser,count\nA,B,many\n", f"games.csv line 2: {COUNT} 'many'"),
        ("winner,loser,count\nA,B,\n", f"games.csv line 2: {COUNT} ''"),
        ("winner,loser,count\nA,B,1e-300\n", f"games.csv line 2: {COUNT} '1e-300'"),
        ("winner,loser,count,tie\nA,B,1,maybe\n", f"games.csv line 2: {TIE} 'maybe'"),
        ("winner,loser,count\n", "games.csv: has no games. A row needs winner and loser, and may have count and tie"),
        ("", "games.csv: has no games. A row needs winner and loser, and may have count and tie"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(text: str, says: str) -> None:
    assert refused(games(text)) == says


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"winner": 1, "loser": "B"}', "games.jsonl line 1: 'winner' must be text, it is a number"),
        ('{"winner": "A", "loser": null}', "games.jsonl line 1: 'loser' must be text, it is null"),
        ('{"winner": "A", "loser": "B", "count": true}', f"games.jsonl line 1: {COUNT} True"),
        ('{"winner": "A", "loser": "B", "count": null}', f"games.jsonl line 1: {COUNT} None"),
        ('{"winner": "A", "loser": "B", "count": [2]}', f"games.jsonl line 1: {COUNT} [2]"),
        ('{"winner": "A", "loser": "B", "tie": 2}', f"games.jsonl line 1: {TIE} 2"),
        ('{"winner": "A", "loser": "B", "tie": 0.5}', f"games.jsonl line 1: {TIE} 0.5"),
        ('{"winner": "A"', 'games.jsonl line 1: not JSON (Expecting \',\' delimiter at column 15): {"winner": "A"'),
        ("{}", f"games.jsonl line 1: no 'winner'. {NEEDS} nothing"),
    ],
)
def test_a_bad_line_of_json_is_refused_too(line: str, says: str) -> None:
    assert refused(games(line + "\n", "games.jsonl")) == says


def test_a_file_that_is_not_there_is_named() -> None:
    games(WORKED)
    assert refused(Path("game.csv")) == "game.csv: no such file; did you mean games.csv?"
    assert refused(Path("owner/games")) == "owner/games: no such file; name a file of games"


def test_a_column_of_something_else_is_no_thousand_players() -> None:
    rows = "".join(f"a{row},b{row}\n" for row in range(501))
    says = "games.csv line 502: more than 1,000 players; 'winner' and 'loser' must be names"
    assert refused(games("winner,loser\n" + rows)) == says


# What cannot be ranked


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["Anna,Bert"], "Anna never lost to the others, so their strength has no bound"),
        (
            ["Anna,Bert", "Bert,Anna", "Anna,Carl", "Bert,Dora", "Carl,Dora", "Dora,Carl"],
            "Anna and Bert never lost to the others, so their strength has no bound",
        ),
        (
            ["Anna,Bert", "Bert,Anna", "Anna,Carl"],
            "Carl never beat the others, so their strength has no bound",
        ),
        (
            ["Anna,Bert", "Bert,Carl", "Carl,Bert", "Carl,Dora"],
            "Anna never lost to the others and Dora never beat the others, so their strengths have no bound",
        ),
        (
            ["Anna,Bert", "Bert,Anna", "Carl,Dora", "Dora,Carl", "Anna,Emil", "Emil,Bert"],
            "no game connects these groups, so their strengths cannot be compared: Anna, Bert and Emil | Carl and Dora",
        ),
        (
            ["z\x07,a"] + [f"{one},z\x07" for one in "abcdefg"],
            "z\\x07 and a never beat the others, so their strength has no bound",
        ),
    ],
)
def test_who_stands_in_the_way_of_a_ranking_is_named_with_the_remedy(rows: list[str], says: str) -> None:
    file = games("winner,loser\n" + "\n".join(rows) + "\n")
    assert refused(file) == f"games.csv: {says}; set prior=1, which adds a tie of every player with an average player"
    assert "log strength" in shown(file, prior=1.0)  # the remedy is one


def test_long_lists_of_names_are_cut_and_names_of_others_cannot_act() -> None:
    wins = torch.zeros(20, 20)
    wins[:9, 9:] = 1
    names = ["a\x1b[31m", "b" * 50, *"cdefghijklmnopqrst"]
    with pytest.raises(DataError) as error:
        fit_players("many\n.csv", names, wins)
    assert str(error.value) == (
        f"many\\n.csv: a\\x1b[31m, {'b' * 37}..., c, d, e and 4 others never lost to the others, so their "
        "strength has no bound; set prior=1, which adds a tie of every player with an average player"
    )
    with pytest.raises(DataError) as error:
        fit_players("many.csv", names[2:10], torch.zeros(8, 8))
    assert "cannot be compared: c | d | e | f | g | h | 2 more; set prior=1" in str(error.value)


@pytest.mark.parametrize("prior", [-1.0, math.nan, math.inf, 1e-9])
def test_a_prior_is_a_number_of_games(prior: float) -> None:
    with pytest.raises(ConfigError) as error:
        rank_games(games(WORKED), read_games(games(WORKED)), prior, Reporter(io.StringIO()))
    assert str(error.value) == f"prior={prior:g}: must be 0 or from 0.001 to 1e+09 games; 1 is usual"


# What is shown


def test_the_worked_example_is_shown() -> None:
    # alpha is 1 : 1/2 : 5/3, so log strengths are ln 1, ln 1/2 and ln 5/3 less their mean -0.0608, and P(C beats A) =
    # 5/8, P(A beats B) = 2/3, P(C beats B) = 10/13. The differences C - A and A - B have standard errors
    # sqrt(1/3 + 1/5) = 0.730 and sqrt(1/8 + 1/4) = 0.612; sqrt(0.533 + 0.375)/3 = 0.318 is A's.
    assert shown(games(WORKED)) == (
        "games.csv: 20 games between 3 players\n"
        "\n"
        "   player   log strength (95%)  s.e.  games  wins  % beats next\n"
        "1  C        0.57 (-0.46, 1.61)  0.53      8     5   62 (28, 87)  ~\n"
        "2  A        0.06 (-0.56, 0.68)  0.32     20    11   67 (38, 87)  ~\n"
        "3  B       -0.63 (-1.56, 0.30)  0.48     12     4\n"
        "~ the 95% interval of % beats next contains 50\n"
        "\n"
        "   % row beats column   C   A   B\n"
        "1  C                    -  62  77\n"
        "2  A                   37   -  67\n"
        "3  B                   23  33   -"
    )


def test_a_circle_is_said_not_to_fit_one_ranking() -> None:
    text = shown(games("winner,loser,count\nA,B,8\nB,A,2\nB,C,8\nC,B,2\nC,A,8\nA,C,2\n"))
    # chi-square 6 * 3^2 / 5 = 10.8; the deviance 6 (8 ln 1.6 + 2 ln 0.4) = 11.56; erfc(sqrt(5.4)) = 0.00102
    assert text.splitlines()[-2:] == [
        "fit: deviance 11.6, chi-square 10.8 on 1 degree of freedom, p = 0.001",
        "warning: one strength per player does not fit these games: results depend on who plays whom, for instance A "
        "beats B, B beats C and C beats A; compare the games of each two players, not their ranks",
    ]
    assert "1  A       0.00 (-0.58, 0.58)" in text


def test_zero_has_no_sign() -> None:
    # the log-odds of 501 to 500 are 0.002, so that B lies at -0.001
    text = shown(games("winner,loser,count\nA,B,501\nB,A,500\n"))
    assert "2  B       0.00 (-0.06, 0.06)  0.03" in text and "-0.00" not in text


def test_a_table_that_fits_has_no_warning() -> None:
    text = shown(games("winner,loser,count\nA,B,6\nB,A,4\nB,C,6\nC,B,4\nA,C,7\nC,A,3\n"))
    assert text.splitlines()[-1].startswith("fit: deviance 0.0") and text.endswith("on 1 degree of freedom, p = 0.97")


def test_players_told_apart_carry_no_mark() -> None:
    # 80 to 20: 1.96 sqrt(1/80 + 1/20) = 0.49 is less than ln 4
    text = shown(games("winner,loser,count\nB,A,80\nA,B,20\n"))
    assert "~" not in text
    assert "1  B          0.69 (0.45, 0.94)  0.12    100    80   80 (71, 87)\n" in text
    assert "2  A       -0.69 (-0.94, -0.45)  0.12    100    20\n" in text


def test_a_prior_and_columns_that_mean_nothing_are_told() -> None:
    text = shown(games("winner,loser,count,judge,date\nA,B,8,me,today\nB,C,8,me,today\nC,A,1,,\n"), prior=2.5)
    assert text.splitlines()[:3] == [
        "warning: games.csv: columns not used: judge, date. A row has winner, loser, count and tie",
        "games.csv: 17 games between 3 players",
        "prior=2.5 adds 2.5 ties of every player with an imaginary average player",
    ]
    assert text.endswith("on 1 degree of freedom; no p-value, because a prior changes both")


def test_clusters_are_told() -> None:
    prompts = torch.ones(12, 3, 3) - torch.eye(3)
    prompts[:6, 0, 1] = 2
    prompts[6:, 1, 2] = 2
    wins = prompts.sum(0)
    stream = io.StringIO()
    names = ["A", "B", "C"]
    show_ranking(names, wins, fit_players("games", names, wins, clusters=prompts), Reporter(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "intervals are over 12 prompts, not games: games of one prompt share their responses"
    assert lines[-1].endswith("on 1 degree of freedom; no p-value, because games of one prompt are not independent")


def test_one_prompt_is_no_sample_of_prompts() -> None:
    wins = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    with pytest.raises(DataError) as error:
        fit_players("prompts.jsonl", ["A", "B"], wins, clusters=wins[None])
    assert str(error.value) == ("prompts.jsonl: has one prompt, and intervals need two; use more prompts")


LONG = [f"family/model-{size}b-instruct-dpo-\u202e" for size in range(1, 9)]


def test_eight_players_with_long_names_fit_80_columns() -> None:
    wins = 1000 * torch.ones(8, 8) + torch.arange(8)[:, None] * 900
    wins = wins * (1 - torch.eye(8))
    stream = io.StringIO()
    show_ranking(LONG, wins, fit(wins), Reporter(stream))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0] == "1  family/model-8b-instruct-dpo-\\u202e"  # in full once, shortened in the tables
    head = next(place for place, line in enumerate(lines) if "log strength" in line)
    assert [line[:17] for line in lines[head + 1 : head + 9]] == [
        f"{rank}  ...model-{9 - rank}b..." for rank in range(1, 9)
    ]
    # a line a player, and numbers head the matrix
    assert lines[head + 10] == "   % row beats column   1   2   3   4   5   6   7   8"
    assert len(lines) == 8 + 1 + 9 + 1 + 9 + 1 + 1


def test_more_players_than_a_screen_holds_have_no_matrix_there() -> None:
    wins = torch.ones(13, 13) - torch.eye(13)
    stream = io.StringIO()
    show_ranking([f"p{player}" for player in range(13)], wins, fit(wins), Reporter(stream))
    assert "\nwin probabilities are not shown for more than 12 players\n" in stream.getvalue()


def test_no_number_of_games_shows_a_certainty() -> None:
    text = shown(games("winner,loser,count\nA,B,100000\nB,A,1\n"))
    assert text.endswith(
        "   % row beats column   A    B\n1  A                    -  >99\n2  B                   <1    -"
    )


# What is written


def test_the_file_holds_everything_best_first() -> None:
    read = read_games(games(WORKED))
    fitted = fit(read.wins)
    write_ranking(Path("deep/er/ranking.json"), read.players, read.wins, fitted)
    found = json.loads(Path("deep/er/ranking.json").read_text())
    assert found["names"] == ["C", "A", "B"]
    # 1 : 1/2 : 5/3 is 6/19, 3/19 and 10/19
    assert found["strengths"] == pytest.approx([10 / 19, 6 / 19, 3 / 19])
    mean = (math.log(1 / 2) + math.log(5 / 3)) / 3
    assert found["log_strengths"] == pytest.approx([math.log(5 / 3) - mean, -mean, math.log(1 / 2) - mean])
    assert found["wins"] == [[0, 5, 0], [3, 0, 8], [0, 4, 0]]
    assert found["win_probabilities"][0] == pytest.approx([1 / 2, 5 / 8, 10 / 13])
    assert found["win_probabilities"][2] == pytest.approx([3 / 13, 1 / 3, 1 / 2])
    # A's variance is (1/8 + 1/4 + 1/3 + 1/5) / 9
    error = math.sqrt(1 / 8 + 1 / 4 + 1 / 3 + 1 / 5) / 3
    assert found["standard_errors"][1] == pytest.approx(error)
    assert found["covariance"][1][1] == pytest.approx(error**2)
    assert found["intervals95"][1] == pytest.approx([-mean - 1.959964 * error, -mean + 1.959964 * error], abs=1e-6)
    # A against B: ln 2 -+ 1.96 sqrt(1/8 + 1/4)
    half = 1.959964 * math.sqrt(1 / 8 + 1 / 4)
    ends = [1 / (1 + math.exp(-(math.log(2) - half))), 1 / (1 + math.exp(-(math.log(2) + half)))]
    assert found["win_probability_intervals95"][1][2] == pytest.approx(ends, abs=1e-6)
    assert {key: found[key] for key in ("degrees_of_freedom", "p_value", "prior", "clusters")} == {
        "degrees_of_freedom": 0, "p_value": None, "prior": 0.0, "clusters": None,
    }  # fmt: skip
    assert found["deviance"] == pytest.approx(0, abs=1e-12) and found["chi_square"] == pytest.approx(0, abs=1e-12)
    assert [path.name for path in Path("deep/er").iterdir()] == ["ranking.json"]


def test_rank_games_returns_what_it_shows() -> None:
    fitted = rank_games(games(WORKED), read_games(games(WORKED)), 0.5, Reporter(io.StringIO()))
    expected = fit(read_games(Path("games.csv")).wins, 0.5)
    assert torch.equal(fitted.log_strengths, expected.log_strengths) and fitted.prior == 0.5


def test_a_ranking_that_cannot_be_written_is_said_in_one_line() -> None:
    wins = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    games("", "taken")
    with pytest.raises(StorageError) as error:
        write_ranking(Path("taken/ranking.json"), ["A", "B"], wins, fit(wins))
    assert str(error.value) == "taken/ranking.json: cannot be written (File exists)"
