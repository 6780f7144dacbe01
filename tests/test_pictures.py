"""The pictures: any run can be drawn, without a warning, and what is on them is what the logs say."""

import json
import math
import struct
import warnings
from itertools import combinations

import pytest
from conftest import metrics, script

from recipes import compare_plot, toy_hack
from reinforce.baselines import BASELINES
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.run import curves, pictures


@pytest.fixture(autouse=True)
def no_warnings():
    """A missing glyph, an axis without extent, a legend without an entry: matplotlib warns of them all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, each as its axes by letter."""
    made = []
    from matplotlib.figure import Figure

    real = Figure.subplot_mosaic
    monkeypatch.setattr(Figure, "subplot_mosaic", lambda self, *a, **k: (made.append(real(self, *a, **k)), made[-1])[1])
    return made


def write_run(folder, steps, kl=True, validation=True, reward=lambda i: 1 - math.exp(-i / 9)):
    """A run folder with the logs that are drawn."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": i, "reward": reward(i), "kl": i / 10 if kl else None, "response_length": 9 + i % 3, "entropy": 0.9}
             for i in range(1, steps + 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"prompt": "p", "response": ["x"], "kl": None, "valid": [True], "length": [1], "finished": [True], "logp": [0.0]}
    rows = [{"step": step, "index": i, **fields, "reward": [step + i], "objective": [0.0]} for step in (0, steps) for i in range(4)]
    if validation:
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def size(path):
    """Width and height of a PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


RUNS = {
    "one step": {"steps": 1}, "two steps": {"steps": 2}, "five steps": {"steps": 5}, "3000 steps": {"steps": 3000},
    "no KL": {"steps": 50, "kl": False}, "one step without KL and validation": {"steps": 1, "kl": False, "validation": False},
    "no validation": {"steps": 50, "validation": False}, "a constant reward": {"steps": 50, "reward": lambda i: 0.5},
    "a reward of rounding errors": {"steps": 50, "reward": lambda i: 1.5 + i * 1e-12},
    "every response refused in some steps": {"steps": 50, "reward": lambda i: None if i % 7 == 0 else float(i)},
    "every response refused": {"steps": 5, "reward": lambda i: None, "validation": False},
    "a reward that is not finite": {"steps": 50, "reward": lambda i: math.nan if i == 3 else -1e9},
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_curves_of_any_run_are_two_rows_with_whole_steps_and_no_gaps(run, tmp_path, drawn):
    folder = write_run(tmp_path / "run", **run)
    curves.draw_curves(folder)
    width, height = size(folder / "curves.png")
    assert width == pictures.WIDTH * pictures.DPI >= 1200 and 0.6 < height / width < 0.9
    (axes,) = drawn
    assert len({round(axis.get_position().y0, 2) for axis in axes.values()}) == 2
    for letter in "ADE":
        ticks = [t for t in axes[letter].get_xticks() if axes[letter].get_xlim()[0] <= t <= axes[letter].get_xlim()[1]]
        assert len(ticks) >= 2 and all(t == int(t) for t in ticks)
    for axis in axes.values():
        assert all(math.isfinite(v) for line in axis.lines for v in line.get_ydata())
        assert "+" not in axis.yaxis.get_offset_text().get_text()
    texts = [text.get_text() for letter in "BC" for text in axes[letter].texts]
    assert texts.count("β = 0: no KL") == (2 if run.get("kl") is False else 0)


def test_a_run_without_a_step_has_no_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    curves.draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_the_validation_has_its_mean_and_standard_error(tmp_path, drawn):
    """Rewards step + (0, 1, 2, 3): mean step + 1.5, deviation 1.29, error 0.645."""
    curves.draw_curves(write_run(tmp_path / "run", 10))
    (container,) = drawn[0]["A"].containers
    line, _, (bars,) = container.lines
    assert list(line.get_xdata()) == [0, 10] and list(line.get_ydata()) == [1.5, 11.5]
    for (_, low), (_, high) in bars.get_segments():
        assert (high - low) / 2 == pytest.approx(math.sqrt(5 / 3) / 2)


def test_reward_against_kl_is_coloured_by_the_step(tmp_path, drawn):
    folder = write_run(tmp_path / "run", 50)
    curves.draw_curves(folder)
    (dots,) = drawn[0]["B"].collections
    assert dots.get_array().tolist() == list(range(1, 51))
    assert dots.get_offsets().tolist() == [pytest.approx([line["kl"], line["reward"]]) for line in metrics(folder)]


def test_a_smoothed_line_is_a_mean_around_each_point():
    values = [float(i % 2) for i in range(80)]
    line = pictures.smoothed(values)
    assert len(line) == 80 and line[10] == pytest.approx(sum(values[8:13]) / 5) and line[0] == pytest.approx(1 / 3)
    assert pictures.smoothed([2.0]) == [2.0]


def dichromat_distance(a, b):
    """How far two colours are apart for an eye that lacks one of its cones: the least of the three."""
    import numpy as np

    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = [[[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]]  # protan, deutan
    x, y = (lms @ [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (a, b))
    return min(float(np.abs(np.linalg.solve(lms, np.array(m) @ (x - y))).max()) for m in blind)


def test_baselines_differ_in_colour_for_colour_blind_eyes_and_in_dashes_and_markers():
    """See "Digital Video Colourmaps for Checking the Legibility of Displays by Dichromats", Viénot, Brettel and Mollon (1999)."""
    assert set(compare_plot.LOOKS) == set(BASELINES)
    for (a, dash_a, mark_a), (b, dash_b, mark_b) in combinations([*compare_plot.LOOKS.values(), *compare_plot.OTHER_LOOKS], 2):
        assert dichromat_distance(a, b) > 0.1 and dash_a != dash_b and mark_a != mark_b


def comparison_run(seed, shift, kl=True):
    return [{"step": i + 1, "reward": i / 20 + shift + seed / 100, "kl": i / 10 if kl else None, "tokens_so_far": 100 * (i + 1)}
            for i in range(20)]  # fmt: skip


def draw_comparison(path, names, kl=True, measured=True, unclear=()):
    runs = {
        name: [comparison_run(s, 0.0 if name in ("rloo", "group-mean") else 0.1 * i, kl) for s in range(3)]
        for i, name in enumerate(names)
    }
    ratios = [{name: None if name in unclear and s == 2 else 1.0 + s for name in names} for s in range(3)] if measured else []
    labels = {name: name.rpartition(":")[2] for name in names}
    compare_plot.draw(runs, labels, {"initial": ratios, "trained": ratios[:1]}, 2000, path)


def test_lines_that_coincide_are_both_seen(tmp_path, drawn):
    draw_comparison(tmp_path / "compare.png", list(BASELINES))
    assert min(size(tmp_path / "compare.png")) >= 1200
    (axes,) = drawn
    for letter in "AB":
        lines = {line.get_color(): line for line in axes[letter].lines if len(line.get_xdata()) == compare_plot.POINTS}
        below, above = lines[pictures.BLUE], lines[pictures.SKY]
        assert list(below.get_ydata()) == list(above.get_ydata()), "rloo and group-mean"
        assert below.get_linewidth() > above.get_linewidth() + 1 and below.get_linestyle() == "-" != above.get_linestyle()
        assert len({line.get_markevery()[0] for line in lines.values()}) == len(BASELINES), "no marker hides another one"


def test_a_baseline_has_one_look_in_all_panels_and_whichever_others_are_compared(tmp_path, drawn):
    draw_comparison(tmp_path / "a.png", ["rloo", "mine.py:median", "grpo"])
    draw_comparison(tmp_path / "b.png", ["grpo", "rloo"])
    for axes in drawn:
        for axis in axes.values():
            markers = {line.get_color(): line.get_marker() for line in axis.lines if line.get_marker() not in ("None", "_", 2, 3)}
            assert (markers[pictures.BLUE], markers[pictures.GREEN]) == ("o", "v")
    assert [t.get_text() for t in drawn[0]["C"].get_xticklabels()] == ["rloo", "median", "grpo"]


def test_noise_that_not_all_seeds_could_measure_is_not_drawn(tmp_path, drawn):
    """The mean of the others would be that of the clearer seeds; the table says how many there are."""
    draw_comparison(tmp_path / "compare.png", ["rloo", "grpo"], unclear=["rloo"])
    colors = {line.get_color() for line in drawn[0]["C"].lines}
    assert pictures.GREEN in colors and pictures.BLUE not in colors


def test_a_comparison_without_kl_or_noise_says_so(tmp_path, drawn):
    draw_comparison(tmp_path / "compare.png", ["rloo", "none"], kl=False, measured=False)
    assert [text.get_text() for letter in "BC" for text in drawn[0][letter].texts] == ["β = 0: no KL", "not measured"]


GOOD, NEUTRAL, BROKEN = "the crust was superb .", "the crust was usual .", "superb superb crust the was ."


def test_the_hack_is_read_from_the_rollouts_by_the_grammars_own_label(tmp_path, drawn):
    rows = [{"step": s, "response": [GOOD, NEUTRAL] if s == 1 else [BROKEN, GOOD], "reward": [1.0, 0.0]} for s in (1, 1, 2)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = toy_hack.read_steps(tmp_path)
    assert first == toy_hack.Step(0.5, 1.0, 0.5, GOOD) and second == toy_hack.Step(0.5, 0.5, 0.5, BROKEN)
    long = toy_hack.Step(1.0, 0.0, 0.0, " ".join(["charming"] * 24))
    toy_hack.draw({0.05: [first, second], 0.0: [first, long]}, tmp_path / "hack.png")
    assert size(tmp_path / "hack.png")[0] == 1500
    assert [list(line.get_ydata()) for line in drawn[0]["B"].lines] == [[1.0, 0.5], [1.0, 0.0]]
    (legend,) = drawn[0]["A"].figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn[0]["A"].figure.bbox.width


@pytest.mark.parametrize("name", ["none/hack.png", "hack.jpg", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_any_training(name, tmp_path):
    with pytest.raises(ConfigError, match=r"--picture .*NAME\.png"):
        parse(toy_hack.Config, "", ["--picture", str(tmp_path / name)])


@pytest.mark.slow
def test_one_command_trains_both_and_draws_the_hack(tmp_path):
    out = script("recipes/toy_hack.py", "--max-steps", 2, "--log-dir", tmp_path / "h", OMP_NUM_THREADS=1)
    assert out.returncode == 0 and f"picture     {tmp_path}/h/hack.png\n" in out.stdout, out.stdout
    assert size(tmp_path / "h/hack.png")[0] == 1500 and (tmp_path / "h/beta-0/metrics.jsonl").exists()
