"""The figures, on invented runs whose numbers are known."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from lab_runs import invented, metric_rows, results

from capo import InputError
from capo.lab.figures import all_figures, figure_named
from capo.lab.figures.claims import CLAIMS
from capo.lab.figures.reproduce import RECORD, command_of, record_of, write_up
from capo.lab.figures.verdicts import BEGIN, END, judge_all, judged, write_verdicts
from capo.lab.figures.warning import warning_of
from capo.lab.sweep.curves import curve_table
from capo.lab.sweep.drive import distinct
from capo.lab.sweep.estimate import forecast
from capo.lab.sweep.point import Point

LEARNS = [0.45, 0.6, 0.75, 0.8, 0.9]
FALLS = [0.45, 0.4, 0.1, 0.0, 0.0]
STAYS = [0.45, 0.46, 0.45, 0.46, 0.47]
NIGHT_HOURS, CORES = 10, 2


@pytest.mark.parametrize("figure", list(all_figures()), ids=lambda figure: figure.name)
def test_every_committed_grid_can_be_run_with_five_seeds(figure):
    grid = figure.grid(None, [])
    assert grid.seeds == [0, 1, 2, 3, 4]
    assert grid.points()
    assert figure.text().startswith("# ")


def test_the_whole_set_takes_a_night_on_two_cores_at_most(tmp_path):
    points = [point for figure in all_figures() for point in figure.grid(None, []).points()]
    cost = forecast(points, tmp_path)
    assert cost.runs < len(points)  # shared
    assert cost.core_seconds / CORES / 3600 < NIGHT_HOURS


def test_figures_share_their_runs():
    """Fig. 1's aggressive CAPO run is one of many others; Fig. 7 is a part of the rivals."""
    folders = {
        figure.name: set(distinct(figure.grid(1, []).points()))
        for figure in all_figures()
        if figure.name != "map"
    }
    one = figure_named("fig1").grid(1, []).points()
    (capo,) = (point for point in one if point.cell.variant == "capo")
    sharing = {name for name, found in folders.items() if capo.folder() in found}
    assert sharing == {"fig1", "fig5", "fig6", "fig8", "selections", "proxies", "rivals"}
    assert folders["fig7"] < folders["rivals"]


def test_an_unknown_figure_is_named():
    with pytest.raises(InputError, match="did you mean 'fig7'"):
        figure_named("fig77")


def test_the_command_says_what_was_laid_over_the_grid():
    figure = figure_named("fig3")
    assert command_of(figure, figure.grid(None, [])) == "capo lab reproduce fig3"
    changed = figure.grid(2, ["training.steps=4"])
    assert command_of(figure, changed) == (
        "capo lab reproduce fig3 --seeds 2 --set training.steps=4"
    )


def drawn(name, of, seeds=2):
    figure = figure_named(name)
    grid = figure.grid(seeds, [])
    result = results(grid, of)
    numbers = figure.draw(result)
    return figure, grid, result, numbers


def verdict(name, numbers, start):
    """The verdict on the claim of a figure that begins so."""
    (claim,) = (c for c in CLAIMS if c.figure == name and c.claim.startswith(start))
    record = {"runs": 1, "wanted": 1, "numbers": json.loads(json.dumps(numbers.numbers))}
    return judged(claim, record)


def fig1_run(masked):
    def of(cell, seed):
        conservative = "conservative" in cell.variant
        if cell.variant in ("grpo", "dr-grpo", "reinforce"):
            curve = FALLS
        elif conservative:
            curve = [0.45, *[0.5] * 58, 0.75, 0.75, 0.75]
        else:
            curve = masked
        return invented(Point(cell, seed), curve)

    return of


def test_fig1_counts_completions_and_collapses():
    _, _, _, numbers = drawn("fig1", fig1_run([0.45, 0.75, 0.75, 0.75]))
    # The third of three evaluations at the target: 61 and 3 spacings of 192 completions.
    assert numbers.numbers["efficiency"]["capo"]["low"] == pytest.approx(61 / 3)
    assert verdict("fig1", numbers, "Aggressive").verdict == "holds"
    assert verdict("fig1", numbers, "CAPO, Dr.CAPO").verdict == "holds"
    assert verdict("fig1", numbers, "CAPO reaches").verdict == "holds in part"
    assert "20.33" in verdict("fig1", numbers, "CAPO reaches").numbers
    _, _, _, numbers = drawn("fig1", fig1_run(FALLS))
    assert verdict("fig1", numbers, "CAPO, Dr.CAPO").verdict == "does not hold"
    assert verdict("fig1", numbers, "CAPO reaches").verdict == "does not hold"
    assert numbers.numbers["efficiency"]["capo"]["low"] == 0  # a bound from both sides


def signal_run(seed, level, jump_at, curve, grid_cell):
    shift = lambda step: level * (100 if jump_at is not None and step >= jump_at else 1)  # noqa: E731
    rows = metric_rows(8, capo__batch__policy_shift=shift, capo__batch__objective_shift=shift)
    return invented(Point(grid_cell, seed), curve, rows)


def test_fig3_measures_the_lead_of_the_warning():
    def of(cell, seed):
        falls = cell.at["training.learning_rate"] == 1e-3
        # The first evaluation below half of 0.45 is the third, after step 4; the alarm is at step 2.
        return signal_run(seed, 1e-4, 2 if falls else None, FALLS if falls else LEARNS, cell)

    _, _, result, numbers = drawn("fig3", of)
    found = numbers.numbers["warnings"]["capo/batch/policy_shift"]
    assert (found["warned"], found["collapsed"], found["lead"]) == (2, 2, 2)
    assert (found["false_alarms"], found["stable"]) == (0, 6)
    assert found["level"] == pytest.approx(2e-4)
    assert verdict("fig3", numbers, "m_F and m_H").verdict == "holds"
    late = [signal_run(s, 1e-4, 5, FALLS, result.cells[-1].cell) for s in (0, 1)]
    stable = [run for run in result.runs if not run.collapsed]
    assert warning_of("capo/batch/policy_shift", late, stable)["warned"] == 0  # after the collapse
    noisy = [signal_run(9, 1e-2, None, LEARNS, result.cells[0].cell), *stable]
    assert warning_of("capo/batch/policy_shift", late, noisy)["false_alarms"] == 1


def test_fig5_reads_the_peak_and_the_end():
    def of(cell, seed):
        rate = lambda step: 0.08 if step == 2 else 0.01  # noqa: E731
        return invented(Point(cell, seed), LEARNS, metric_rows(8, capo__rejection_rate=rate))

    _, _, _, numbers = drawn("fig5", of)
    (one, *_) = numbers.numbers["rejection"].values()
    assert one["peak"]["value"] == pytest.approx(0.08)
    assert one["late"]["value"] == pytest.approx(0.01)
    assert verdict("fig5", numbers, "Few").verdict == "holds"


def test_thresholds_need_two_decades():
    def of(cell, seed):
        safe = cell.variant in ("sgd-1e-3", "sgd-1e-2", "sgd-1e-1", "adam-1e-2")
        rows = metric_rows(4, capo__rejection_rate=lambda _: 0.2)
        return invented(Point(cell, seed), LEARNS if safe else FALLS, rows)

    _, _, _, numbers = drawn("thresholds", of)
    assert verdict(
        "thresholds", numbers, "Thresholds need no fine tuning, base optimizer SGD"
    ).verdict == ("holds")
    assert verdict(
        "thresholds", numbers, "Thresholds need no fine tuning, base optimizer Adam"
    ).verdict == ("holds in part")


@pytest.mark.parametrize(
    ("safe", "word", "shown"),
    [
        (("1e-6", "1e-3"), "holds in part", "1e-06 to 1e-06, 0.001 to 0.001"),
        (("1e-6", "1e-5", "1e-3", "1e-2"), "holds in part", "1e-06 to 1e-05, 0.001 to 0.01"),
        (("1e-6", "1e-4", "1e-3", "1e-2"), "holds", "1e-06 to 1e-06, 0.0001 to 0.01"),
        ((), "does not hold", "none"),
    ],
)
def test_thresholds_over_two_decades_are_neighbours(safe, word, shown):
    def of(cell, seed):
        optimizer, _, tail = cell.variant.partition("-")
        curve = LEARNS if optimizer == "sgd" and tail in safe else FALLS
        return invented(Point(cell, seed), curve)

    _, _, _, numbers = drawn("thresholds", of)
    found = verdict("thresholds", numbers, "Thresholds need no fine tuning, base optimizer SGD")
    assert found.verdict == word
    assert f"learns at δ_F {shown}, best" in found.numbers


def test_the_map_says_where_masks_rescue():
    def of(cell, seed):
        optimizer, condition, masks = cell.variant.split("-")
        rescued = optimizer == "sgd" or (optimizer == "momentum" and condition == "long")
        return invented(Point(cell, seed), LEARNS if masks == "masks" and rescued else FALLS)

    _, _, _, numbers = drawn("map", of)
    rows = numbers.numbers["map"]
    assert len(rows) == 36
    assert sum(row["rescued"] for row in rows) == 14
    assert all(
        row["gain"]["value"] == pytest.approx(0.9 if row["rescued"] else 0.0) for row in rows
    )
    assert verdict(
        "map", numbers, "Token masks rescue collapsing runs, base optimizer Adam"
    ).verdict == ("does not hold")
    momentum = verdict("map", numbers, "Token masks rescue collapsing runs, base optimizer SGD")
    assert momentum.verdict == "holds in part"
    assert momentum.numbers.startswith("14 of 24")


def test_masks_that_let_nothing_be_learnt_rescue_nothing():
    def of(cell, seed):
        return invented(Point(cell, seed), STAYS if cell.variant.endswith("-masks") else FALLS)

    _, _, _, numbers = drawn("map", of)
    assert all(row["rescued"] for row in numbers.numbers["map"])
    found = verdict("map", numbers, "Token masks rescue collapsing runs, base optimizer Adam")
    assert found.verdict == "does not hold"
    assert found.numbers.startswith("0 of 12 collapsing settings rescued; no collapse but nothing")


def test_the_map_counts_collapses_over_the_seeds_that_both_have():
    def of(cell, seed):
        masks = cell.variant.endswith("-masks")
        if masks and seed:  # only the first seed is there with masks
            return None
        return invented(Point(cell, seed), LEARNS if masks or not seed else FALLS)

    _, _, _, numbers = drawn("map", of, seeds=3)
    rows = numbers.numbers["map"]
    assert {(row["plain_collapsed"], row["masked_collapsed"], row["runs"]) for row in rows} == {
        (0, 0, 1)
    }
    assert not any(row["rescued"] for row in rows)
    found = verdict("map", numbers, "Token masks rescue collapsing runs, base optimizer Adam")
    assert "nothing collapses" in found.numbers


def test_proxies_and_rivals_compare_intervals():
    def of(best):
        def make(cell, seed):
            return invented(Point(cell, seed), LEARNS if cell.variant in best else STAYS)

        return make

    _, _, _, numbers = drawn("proxies", of({"capo"}))
    assert verdict("proxies", numbers, "(ours").verdict == "holds"
    _, _, _, numbers = drawn("proxies", of({"capo", "random"}))
    assert verdict("proxies", numbers, "(ours").verdict == "does not hold"
    _, _, _, numbers = drawn("rivals", of({"trust-region", "gspo"}))
    assert verdict("rivals", numbers, "(ours)").verdict == "holds"  # equal is not ahead
    behind = verdict("rivals", numbers, "Under identical")
    assert behind.verdict == "does not hold"
    assert "2 of" in behind.numbers  # GSPO at 2 and 5 passes
    _, _, _, numbers = drawn("rivals", of({"gspo-first-pass"}))  # one seed, and GRPO: not ranked
    assert verdict("rivals", numbers, "Under identical").verdict == "holds"


def test_rivals_are_ranked_by_the_highest_learning_rate():
    def of(cell, seed):
        high = cell.at["training.learning_rate"] == 1e-3
        curves = {"trust-region": LEARNS, "kl-1": FALLS if high else LEARNS}
        return invented(Point(cell, seed), curves.get(cell.variant, STAYS))

    _, _, _, numbers = drawn("rivals", of)
    ranked = next(iter(numbers.tables.values()))
    assert ranked[0][""] == "CAPO (trust region)"
    assert ranked[-1][""] == "KL penalty 1"  # best at the lower rate alone
    assert "2 of 2 collapsed" in ranked[-1]["learning rate 0.001"]
    assert "collapsed" not in ranked[-1]["learning rate 0.00025"]
    assert [row[""] for row in ranked].count("GSPO, 5 passes") == 1
    bands = [rule for each in numbers.figures for rule in each.extras["base"]["rule"]]
    assert sorted(bands) == sorted(row[""] for row in ranked)
    for each in numbers.figures:
        assert set(each.data["rule"]) == set(each.extras["base"]["rule"])
        assert list(each.data["series"].unique()) == [
            "learning rate 0.00025",
            "learning rate 0.001",
        ]


def test_ratio_rules_are_compared_with_grpo_on_the_first_pass():
    def of(cell, seed):
        shift = 0.25 if cell.variant == "sapo-first-pass" else 0.0
        rows = metric_rows(3, reward=lambda step: step / 8 + shift)
        return invented(Point(cell, seed), STAYS, rows)

    _, _, result, numbers = drawn("rivals", of)
    assert numbers.numbers["on_policy"] == {
        **dict.fromkeys(("clip-0.02", "clip-0.002", "two-sided", "clip-higher", "gspo"), 0.0),
        "sapo": 0.25,
    }
    alone = [each for each in result.cells if each.cell.variant.endswith("-first-pass")]
    assert [each.wanted for each in alone] == [1] * 8
    ranked = pd.concat([each.data for each in numbers.figures])
    assert (
        not ranked.astype(str)
        .apply(lambda column: column.str.contains("first pass"))
        .any(axis=None)
    )


def test_table5_ranks_tokens_and_batches():
    def of(cell, seed):
        rows = [
            {
                "step": step,
                "truth": 1e-4 * step,
                "token": {
                    "head, sampled": 0.6 if cell.variant == "grpo" else 0.45,
                    "deep": 0.99,
                    "surprise": 0.5,
                    "entropy": 0.4,
                },
                "batch": {"head, sampled": 1e-6 * step**2, "deep": 1e-4 * step},
            }
            for step in range(1, 9)
        ]
        return invented(Point(cell, seed), [], (), rows)

    _, _, _, numbers = drawn("table5", of)
    found = numbers.numbers["spearman"]["grpo/lr1e-04"]["predictors"]
    assert found["head, sampled"]["token"]["value"] == pytest.approx(0.6)
    assert found["head, sampled"]["batch"]["value"] == pytest.approx(1.0)  # ranks, not values
    assert verdict("table5", numbers, "Token-level").verdict == "holds"
    assert verdict("table5", numbers, "(ours").verdict == "holds in part"


def test_table1_leaves_out_the_first_steps():
    def of(cell, seed):
        from capo.lab.sweep.measures import PARTS

        rows = [
            {"step": step, **dict.fromkeys(PARTS, 9.0 if step <= 2 else 1.0)}
            for step in range(1, 7)
        ]
        return invented(Point(cell, seed), [], (), rows)

    _, _, _, numbers = drawn("table1", of)
    assert numbers.numbers["cost"]["capo"]["seconds"] == pytest.approx(6.0)
    assert verdict("table1", numbers, "Judging").verdict == "does not hold"  # 3 parts of 6


def tasks_run(**curves):
    def of(cell, seed):
        if cell.open:
            return None
        return invented(Point(cell, seed), curves[cell.variant.replace("-", "_")])

    return of


def test_tasks_compare_everywhere_with_a_target_of_their_own():
    slow = [0.4, 0.4, 0.75, 0.75, 0.75, 0.75]
    fast = [0.4, 0.75, 0.75, 0.75, 0.9, 0.9]
    figure = figure_named("tasks")
    grid = figure.grid(2, [])
    chosen = {name: cells[0].at for name, cells in grid.candidates().items()}
    grid = grid.model_copy(update={"choices": chosen})
    runs = tasks_run(grpo=FALLS, capo=STAYS, trust_region=fast, grpo_best=slow)
    numbers = figure.draw(results(grid, runs))
    rows = numbers.numbers["tasks"]
    assert len(rows) == 11
    base = (0.45 * 2 + 0.4 * 2) / 4
    assert rows[0]["base"] == pytest.approx(base)
    assert rows[0]["target"] == pytest.approx((1 + base) / 2)
    assert rows[0]["arms"]["grpo"]["collapsed"] == 2
    assert rows[0]["ratio"]["low"] == pytest.approx(4 / 3)  # four and three spacings of 192
    assert verdict("tasks", numbers, "(ours) The trust region's").verdict == "holds"
    assert verdict("tasks", numbers, "(ours) The same defaults end").verdict == "holds"
    assert verdict("tasks", numbers, "(ours) The same defaults take").verdict == "holds"
    assert verdict("tasks", numbers, "CAPO's masks").verdict == "holds"
    lost = tasks_run(grpo=FALLS, capo=FALLS, trust_region=slow, grpo_best=fast)
    numbers = figure.draw(results(grid, lost))
    assert verdict("tasks", numbers, "(ours) The same defaults end").verdict == "does not hold"
    assert verdict("tasks", numbers, "(ours) The same defaults take").verdict == "does not hold"
    assert verdict("tasks", numbers, "CAPO's masks").verdict == "does not hold"
    numbers = figure.draw(results(figure.grid(2, []), runs))  # no search is over
    assert "grpo-best" not in numbers.numbers["tasks"][0]["arms"]
    assert verdict("tasks", numbers, "(ours) The same defaults take").verdict == "not measured"


def test_tasks_on_which_nobody_gets_to_the_target_are_named():
    figure = figure_named("tasks")
    grid = figure.grid(2, [])
    chosen = {name: cells[0].at for name, cells in grid.candidates().items()}
    grid = grid.model_copy(update={"choices": chosen})
    fast = [0.4, 0.75, 0.75, 0.75, 0.9, 0.9]

    def of(stuck):
        def make(cell, seed):
            return invented(Point(cell, seed), STAYS if cell.condition in stuck else fast)

        return make

    conditions = {cell.condition: cell.where for cell in grid.cells()}
    start = "(ours) The same defaults take"
    found = verdict("tasks", figure.draw(results(grid, of({"aiw"}))), start)
    assert found.verdict == "holds in part"
    assert found.numbers.endswith(f"undecided, as neither gets there: {conditions['aiw']}")
    found = verdict("tasks", figure.draw(results(grid, of(conditions))), start)
    assert found.verdict == "not measured"
    assert all(label in found.numbers for label in conditions.values())


def test_a_claim_without_its_runs_is_not_measured(tmp_path):
    found = judge_all(tmp_path)
    assert {each.verdict for each in found} == {"not measured"}
    _, _, _, numbers = drawn("fig1", lambda cell, seed: None)
    assert verdict("fig1", numbers, "Aggressive").verdict == "not measured"


def test_write_up_and_verdicts_page(tmp_path, monkeypatch):
    figure, grid, result, _ = drawn("fig1", fig1_run(LEARNS))
    monkeypatch.setattr("capo.lab.figures.reproduce.read_grid", lambda grid, runs: result)
    folder = write_up(
        figure, grid, tmp_path, tmp_path / "fig1", {"x seed 0": "OSError: disk"}, 12.0
    )
    record = json.loads((folder / RECORD).read_text())
    assert record["command"] == "capo lab reproduce fig1 --seeds 2"
    assert record["commits"] == ["0123456789abcdef"]
    assert (record["runs"], record["wanted"], record["wall_seconds"]) == (20, 20, 12.0)
    assert record["core_seconds"] == pytest.approx(600.0)
    assert record["failed"] == {"x seed 0": "OSError: disk"}
    readme = (folder / "README.md").read_text()
    assert "OSError: disk" in readme
    assert "A processor, 2 cores (10 runs); A processor, 16 cores (10 runs)." in readme
    for slug in ("accuracy-1", "accuracy-2"):
        assert (folder / f"{slug}.svg").read_text().startswith("<svg")
        assert f"{slug}.svg" in readme
    (tmp_path / "README.md").write_text("# Mine\n\nBefore.\n")
    page = write_verdicts(judge_all(tmp_path), tmp_path)
    again = write_verdicts(judge_all(tmp_path), tmp_path)
    text = again.read_text()
    assert page == again
    assert text.startswith("# Mine\n\nBefore.")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "**holds**" in text
    assert json.loads((tmp_path / "verdicts.json").read_text())[0]["verdict"] == "holds"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("seeds", "settings", "there", "field", "message"),
    [
        (2, [], [], "--runs", "no run of fig3 is over"),
        (
            2,
            ["training.steps=5"],
            [0, 1],
            "--output",
            "was made with no --set; give another folder",
        ),
        (1, [], [0], "--output", "was made of 8 runs, here are 4; give another folder"),
        (2, [], [1], "--output", "was made of 8 runs, here are 4; give another folder"),
    ],
)
def test_a_record_is_not_replaced_by_less(
    tmp_path, monkeypatch, seeds, settings, there, field, message
):
    figure = figure_named("fig3")
    folder = tmp_path / "fig3"

    def write(seeds, settings, there):
        grid = figure.grid(seeds, settings)
        found = results(
            grid, lambda cell, seed: invented(Point(cell, seed), LEARNS) if seed in there else None
        )
        monkeypatch.setattr("capo.lab.figures.reproduce.read_grid", lambda grid, runs: found)
        write_up(figure, grid, tmp_path, folder, {}, 1.0)

    write(2, [], [0, 1])
    before = contents(folder)
    with pytest.raises(InputError, match=message) as error:
        write(seeds, settings, there)
    assert error.value.field == field
    assert contents(folder) == before
    (folder / "of-an-older-figure.svg").write_text("<svg/>")
    (folder / "runs.tar.xz").write_text("kept")
    write(3, [], [0, 1])  # of as many runs
    assert set(contents(folder)) == {*before, "runs.tar.xz"}
    assert json.loads((folder / RECORD).read_text())["wanted"] == 12


def test_a_first_write_up_may_be_of_failures_alone(tmp_path):
    figure = figure_named("fig3")
    folder = write_up(
        figure, figure.grid(1, []), tmp_path, tmp_path / "fig3", {"x": "OSError: disk"}, 1.0
    )
    assert "OSError: disk" in (folder / "README.md").read_text()


def test_curves_hold_the_last_value_of_a_run_that_is_over():
    figure = figure_named("fig3")
    result = results(
        figure.grid(2, []),
        lambda cell, seed: invented(Point(cell, seed), LEARNS[: 3 + 2 * seed]),
    )
    table = curve_table(result.cells[:1])
    last = table.iloc[-1]
    assert last["completions"] == 4 * 192
    assert last["n"] == 2
    assert last["value"] == pytest.approx((0.75 + 0.9) / 2)
    assert (last["low"], last["high"]) == (pytest.approx(0.75), pytest.approx(0.9))


def test_record_knows_what_is_missing():
    figure, grid, result, numbers = drawn(
        "fig3", lambda cell, seed: invented(Point(cell, seed), LEARNS) if seed else None
    )
    record = record_of(figure, grid, result, numbers, {}, 0.0)
    assert (record["runs"], record["wanted"]) == (4, 8)
