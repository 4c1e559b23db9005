"""The benchmarks: what they count, against totals counted independently; how they time; and a run of each on tiny models."""

import json
import types

import numpy as np
import pytest

import promoe
from benchmarks import (
    bench_scaling,
    bench_step,
    counts,
    machine,
    peak,
    report,
    results,
    rounds,
    vs_official,
)

TINY = promoe.preset("ProMoE-S").replace(**vs_official.SIZES["tiny"])


@pytest.fixture
def quick(monkeypatch):
    """Peaks that take no time to measure: 100 GFLOP/s and 50 GB/s; and the threads of the suite afterwards."""
    monkeypatch.setattr(peak, "fma", lambda level, threads, compute="fp32", times=3: peak.Rate(1e11, 1e11))
    monkeypatch.setattr(peak, "bandwidth", lambda *_: {"update": peak.Rate(5e10, 5e10)})
    monkeypatch.setattr(machine, "load", lambda seconds=0.5: 0.0)
    threads = promoe.get_num_threads()
    yield
    promoe.set_num_threads(threads)


# ---------------------------------------------------------------- what they count


@pytest.mark.parametrize("size, gflop, training", [
    ("S", 12.13, 37.0), ("B", 46.04, 139.3), ("L", 161.47, 487.6), ("XL", 237.34, 716.3)])
def test_operations_of_the_papers_models(size, gflop, training):
    config = promoe.preset(f"ProMoE-{size}")
    assert round(sum(counts.forward(config).values()) / 1e9, 2) == gflop
    assert round(counts.training(config) / 1e9, 1) == training
    assert sum(counts.forward(config, 8).values()) == 8 * sum(counts.forward(config).values())
    assert sum(counts.step(config, 3).values()) == counts.training(config, 3)


def test_operations_of_other_models():
    """By hand: 4 tokens of width 8, one block, a dense FFN of 32, patches of 4 voxels."""
    config = promoe.preset("DiT-S").replace(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2,
                                            learn_sigma=False)
    assert counts.forward(config) == {
        "patch_embed": 2 * 4 * 4 * 8,
        "linear": 2 * (256 * 8 + 8 * 8 + 48 * 8 + 16 * 8) + 2 * 4 * (24 * 8 + 8 * 8 + 8 * 4),
        "attention": 2 * 2 * 4 * 4 * 8,
        "experts": 2 * 2 * 4 * 8 * 32}
    moe = config.replace(num_routed_experts=4, top_k=2, interleave=False, use_shared_expert=False)
    assert counts.forward(moe)["experts"] == 2 * 2 * 4 * 8 * 2 * moe.expert_width


def test_operations_by_the_kind_of_product():
    ops = {"linear": 5, "experts": 7, "prototypical_routing": 2}
    assert counts.by_compute(ops, "bf16") == {"bf16": 12, "fp32": 2}
    assert counts.by_compute(ops, "fp32") == {"fp32": 14}


def test_floor():
    assert counts.floor(100, fma=50) == 2
    assert counts.floor(100, fma=50, parameters=10, update=440) == 3
    assert counts.floor(100, fma=50, parameters=10, update=480, compute="bf16") == 3
    assert counts.optimizer_bytes(10, "fp32") == 520


# ---------------------------------------------------------------- how they time


def test_the_peak_is_measured():
    level, threads = peak.here()
    rate = peak.fma(level, threads, times=1)
    assert 1e9 < rate.wall < 1e14 and 1e9 < rate.cpu < 1e14


def test_the_bandwidth_is_measured_beyond_the_caches(monkeypatch):
    monkeypatch.setattr(peak, "available", lambda: 1 << 40)
    assert 4 * 14 * peak.floats(14) > 1.5 * peak.last_level_cache() >= 1.5 * (32 << 10)
    monkeypatch.setattr(peak, "last_level_cache", lambda: 1 << 30)
    monkeypatch.setattr(peak, "available", lambda: 128 << 20)  # what is free bounds it
    assert peak.floats(7) == 1 << 20
    rates = peak.bandwidth(*peak.here(), times=1)
    assert list(rates) == ["read", "copy", "update"] and all(1e8 < rate.wall < 1e13 for rate in rates.values())


def changing(monkeypatch, speeds):
    """Peaks that take one value after the other."""
    values = iter(speeds)
    monkeypatch.setattr(peak, "fma", lambda *_: peak.Rate(speed := next(values), speed))


def test_rounds_under_a_changing_machine_are_rejected(monkeypatch):
    """Work of 100 in a second: half the floor at a peak of 200."""
    changing(monkeypatch, [200.0, 200.0, 300.0, 210.0, 200.0, 200.0])
    piece = rounds.Piece(lambda: rounds.Timing(1.0, 0.5), {"fp32": 100}, 1)
    found = rounds.take({"work": piece}, "generic", seconds=0)["work"]
    assert [row["steady"] for row in found["rounds"]] == [True, False, False]
    assert not found["steady"] and found["rejected"] == 2  # fewer than three: medians of all, and it is said
    assert "never steady" in rounds.note(found)
    changing(monkeypatch, [200.0, 200.0, 300.0, 210.0, 200.0, 200.0])
    piece.rows.clear()
    found = rounds.take({"work": piece}, "generic", seconds=0, least=1)["work"]
    assert found["steady"] and found["rejected"] == 0 and len(found["rounds"]) == 1
    assert found["share_of_floor"] == 0.5 and found["share_of_floor_cpu"] == 1.0 and found["times_operations"] == 2.0


def test_the_floor_has_the_optimizers_bytes(quick):
    piece = rounds.Piece(lambda: rounds.Timing(4.0), {"bf16": 1e11, "fp32": 5e10}, 1, bytes=2.5e10)
    found = rounds.take({"work": piece}, "generic", seconds=0)["work"]
    assert found["floor"] == 2.0 and found["share_of_floor"] == 0.5 and found["bytes_floor"] == 0.5


def test_more_than_the_machine_can_do_is_said(quick):
    piece = rounds.Piece(lambda: rounds.Timing(0.5), {"fp32": 1e11}, 1)
    assert "fault" in rounds.note(rounds.take({"work": piece}, "generic", seconds=0)["work"])


def test_short_pieces_are_run_several_times():
    calls = []
    timing = rounds.clocked(lambda: calls.append(1), 1)()
    assert len(calls) > 100 and 0 < timing.seconds < rounds.SHORTEST


# ---------------------------------------------------------------- a run of each


def test_step(quick):
    found = bench_step.measure(TINY, 2, "fp32", 2, 0.0, guided=True)
    assert found["memory"]["estimate"] == promoe.memory_estimate(TINY, 2)["total"]
    for part in ("train", "evaluation", "guided"):
        assert found[part]["seconds"] > 0 and found[part]["share_of_floor"] > 0
    train = found["train"]
    assert 0 < train["update_seconds"] < train["seconds"] and train["share_of_bandwidth"] > 0
    shares = {row["op"]: row["share"] for row in train["profile"]}
    assert sum(shares.values()) == pytest.approx(1) and "experts backward" in shares
    assert found["train"]["gflop"] == pytest.approx(counts.training(TINY, 2) / 1e9)
    assert found["guided"]["gflop"] == pytest.approx(16 * sum(counts.forward(TINY).values()) / 1e9)


def test_step_without_training(quick):
    found = bench_step.measure(TINY, 1, "fp32", 1, 0.0, training=False)
    assert "train" not in found and found["memory"]["estimate"] == promoe.memory_estimate(TINY, 1, False)["total"]


def test_threads(quick, monkeypatch):
    used = {"step": [], "evaluation": []}
    for what, counted in used.items():
        real = getattr(bench_step.Job, what)

        def run(self, counted=counted, real=real):
            counted.append(promoe.get_num_threads())
            return real(self)
        monkeypatch.setattr(bench_step.Job, what, run)
    found = bench_step.scale(TINY, 1, "fp32", 2, 0.0)
    assert found["step"]["speedup"] == found["step"]["1"]["seconds"] / found["step"]["2"]["seconds"]
    assert found["step"]["peak_speedup"] == 1
    for counted in used.values():  # 1 1 .. 2 2 .. once to warm, and in each of three rounds
        assert [a for a, b in zip(counted, [*counted[1:], 0]) if a != b] == [1, 2] * 4


def test_what_does_not_fit_is_left_out_aloud(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "_available", lambda: 20e9)
    large = promoe.preset("ProMoE-L")
    assert bench_step.fits("L", large, 8, "fp32") == (False, True)
    assert "training left out" in capsys.readouterr().out


def test_scaling(quick):
    points = {(curve, value): (config, batch) for curve, value, config, batch in bench_scaling.points()}
    for count in (4, 128):
        config, batch = points["experts", count]
        assert config.num_routed_experts == count and batch == 8
    ops = [counts.forward(points["experts", count][0])["experts"] for count in (4, 128)]
    assert ops[0] == ops[1]  # a constant active width
    for count in (64, 1024):
        config, batch = points["tokens", count]
        assert config.tokens == count and config.tokens * batch == 2048
    found = bench_scaling.measure(TINY.replace(num_routed_experts=4), 2, "fp32", 1, 0.0)
    assert found["experts"] == 4 and found["train"]["seconds"] > found["evaluation"]["seconds"] > 0


class Benchmark:
    """What bench_ops needs of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            for _ in range(iterations):
                run()
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(data=[1e-3] * rounds))


def test_every_op(quick):
    from benchmarks import bench_ops

    bench_ops.test_every_op_has_a_case()
    head = {"level": "generic", "threads": 1}
    for name, way, compute in bench_ops.listed(TINY, 2):
        if compute not in promoe.backend_info()["computes"]:
            continue
        benchmark = Benchmark()
        bench_ops.bench(benchmark, head, TINY, 2, name, way, compute)
        assert benchmark.extra_info["share_of_floor"] > 0, name
    op, make, _ = bench_ops.cases(TINY, 1)["linear qkv"]
    inputs = make(np.random.default_rng(0))
    bench_ops.verify(op, "forward", "fp32", inputs, None)


def test_an_op_is_verified_before_it_is_timed(quick, monkeypatch):
    from benchmarks import bench_ops

    wrong = bench_ops.ops.silu_forward
    monkeypatch.setattr(bench_ops.ops, "silu_forward", lambda **k: {"y": wrong(**k)["y"] * np.float32(1.001)})
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="silu"):
        bench_ops.bench(benchmark, {"level": "generic", "threads": 1}, TINY, 2, "silu", "forward", "fp32")
    assert not benchmark.extra_info


class Side:
    """A side of vs_official in this process; promoe plays the public code too."""

    def __init__(self, side, python, **arguments):
        self.ours = vs_official.Ours({"model": "tiny", "threads": 1, "compute": "fp32"})
        self.data = vs_official.batch(arguments["batch"], np.random.default_rng(1))
        self.off = 0.0
        if side == "official":
            self.ours.model = bench_step.shaken(TINY, "fp32", np.random.default_rng(0))

    def __call__(self, command, *rest):
        if command in vs_official.WHAT:
            getattr(self.ours, command)(rest[0], *self.data)
        elif command == "show":
            np.save(rest[3], getattr(self.ours, rest[0])(rest[1], *self.data) + np.float32(self.off))
        elif command == "save":
            np.savez(rest[0], **self.ours.model.state_dict())
        elif command == "load":
            self.ours.set_weights(dict(np.load(rest[0])))
            self.off = type(self).wrong
        elif command == "loss":
            return {"loss": self.ours.loss(*self.data)}
        return {"seconds": 0.5, "facts": {"torch": "none"}}

    wrong = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_comparison(quick, monkeypatch):
    monkeypatch.setattr(vs_official, "Process", Side)
    found = vs_official.compare("repo", "python", "tiny", 2, "fp32", 1, 0.0)
    assert found["errors"]["evaluation promoe"]["of_largest"] == 0
    for what in vs_official.WHAT:
        assert found[what]["eager"]["ratio"] == 1 and found[what]["promoe"]["seconds"] == 0.5


def test_nothing_is_timed_when_the_two_disagree(quick, monkeypatch):
    monkeypatch.setattr(Side, "wrong", 0.1)
    monkeypatch.setattr(vs_official, "Process", Side)
    with pytest.raises(SystemExit, match="nothing was timed:\nevaluation of promoe"):
        vs_official.compare("repo", "python", "tiny", 2, "fp32", 1, 0.0)


# ---------------------------------------------------------------- what they leave


@pytest.fixture
def held(quick, tmp_path, monkeypatch):
    """A file with a figure of every kind."""
    monkeypatch.setattr(machine, "commit", lambda: "0123456789ab")
    kept = results.Results(2, tmp_path)
    step = {"model": "ProMoE-tiny", **bench_step.measure(TINY, 2, "fp32", 2, 0.0, guided=True)}
    kept.add("steps", "a", step)
    kept.add("threads", "a", {"model": "ProMoE-tiny", **bench_step.scale(TINY, 1, "fp32", 2, 0.0)})
    monkeypatch.setattr(vs_official, "Process", Side)
    kept.add("official", "a", vs_official.compare("repo", "python", "tiny", 2, "fp32", 1, 0.0))
    point = bench_scaling.measure(TINY, 2, "fp32", 1, 0.0)
    kept.add("scaling", "a", {"curve": "experts", "value": 4, **point})
    kept.add("scaling", "b", {"curve": "tokens", "value": 64, **point})
    return kept


def test_a_result_file_names_its_machine_and_goes_on(held, tmp_path):
    text = json.loads(held.path.read_text())
    assert {"processor", "level", "threads", "when", "commit", "others", "alone"} <= set(text["machine"])
    again = results.Results(2, tmp_path)
    assert again.path == held.path and not again.due("steps", "a") and again.due("steps", "b")
    late = results.Results(2, tmp_path, minutes=0)
    assert not late.due("steps", "b") and late.late == ["steps: b"] and again.late == []
    assert results.Results(1, tmp_path).path != held.path
    assert results.Results(2, tmp_path, again=True).path != held.path
    assert results.newest(tmp_path) == held.path


def test_changed_code_is_never_continued(held, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "0123456789ab+")
    first = results.Results(2, tmp_path)
    first.add("steps", "a", {})
    assert results.Results(2, tmp_path).path != first.path


def test_tables_and_pictures(held, tmp_path):
    read = results.read(held.path)
    text = report.markdown(read)
    assert "ProMoE-tiny, batch 2, fp32" in text and "commit 0123456789ab" in text and "4 experts" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    for path in report.pictures(read, tmp_path / "images"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["cpu.png", "scaling.png"]


def test_figures_stand_in_order():
    rows = [{"model": f"ProMoE-{m}", "batch": b, "compute": c} for m, b, c in
            [("digits", 64, "fp32"), ("B", 1, "bf16"), ("S", 8, "fp32"), ("B", 1, "fp32"), ("S", 1, "fp32")]]
    assert [(r["model"][7:], r["batch"], r["compute"]) for r in report.in_order(rows)] == [
        ("S", 1, "fp32"), ("S", 8, "fp32"), ("B", 1, "fp32"), ("B", 1, "bf16"), ("digits", 64, "fp32")]


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nb\n")
    report.put_into(page, "new\n")
    assert page.read_text() == "a\n<!-- benchmarks -->\nnew\n<!-- /benchmarks -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(SystemExit, match="expected"):
        report.put_into(page, "new")


def test_the_final_run_has_every_part_and_stops_in_time(quick, tmp_path, monkeypatch):
    import benchmarks.__main__ as final

    monkeypatch.setattr(machine, "commit", lambda: "0123456789ab")
    kept = results.Results(2, tmp_path, minutes=0)
    parts = final.parts(kept, 2, "repo", "python")
    assert tuple(parts) == final.PARTS
    assert set(final.parts(kept, 2, None, "python")) == set(final.PARTS) - set(final.OFFICIAL)
    for runs in parts.values():
        for run in runs:
            run()  # there is no time: nothing is measured, and all of it is late
    asked = {(model, batch) for model in "SBL" for batch in (1, 8, 32)} - {("L", 32)}
    for model, batch in asked:
        assert f"steps: ProMoE-{model} batch {batch} fp32" in kept.late
    assert "official: ProMoE-S batch 8 fp32 compiled" in kept.late and "scaling: experts 128 fp32" in kept.late
    assert not kept.path.exists()
