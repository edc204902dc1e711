"""Plans as text, and roofline times."""

import dataclasses
import json

import pytest

from subspace_jax import planning

MESH = {"data": 1, "fsdp": 4, "tensor": 2}
PLAN = planning.Plan(
    program="step",
    topology="v5e:2x4",
    mesh={"data": 1, "fsdp": 4, "tensor": 2},
    examples=8,
    params=4 * 2**30,
    optimizer=8 * 2**30,
    variables=4,
    batch=2**20,
    limit=int(15.75 * 2**30),
    needed_flops=197 * 10**12,
    temporaries=2**30,
    code=2**20,
    total=13 * 2**30,
    flops=197 * 10**12,
    memory_bytes=819 * 10**8,
    collectives=(planning.Collective("all-gather", "fsdp", 4, 3, 4 * 10**10),),
    largest=(planning.Temporary("f32[8,8]", 4096, "jit(step)/dot", "subspace_jax/nn/linear.py:3"),),
    time=planning.Roofline(1.0, 0.1, 0.6),
    compile_seconds=1.0,
    amount=2048,
    unit="tokens",
)


def test_a_plan_is_told_in_words_and_numbers():
    text = planning.plan_text(PLAN)
    for words in (
        "13.00 GiB",
        "fits, 2.75 GiB (17 %) free",
        "all-gather",
        "bound by compute: 1.000 s at best, 1.700 s",
    ):
        assert words in text
    assert planning.advice(PLAN) == []
    assert json.loads(json.dumps(PLAN.as_dict()))["time"]["bound"] == "compute"


def test_plan_speeds_are_of_all_chips_and_mfu_is_of_the_ideal_flops():
    best, worst = PLAN.speeds["best"], PLAN.speeds["worst"]
    assert best == (1.0, 2048.0, 1.0)
    assert worst == pytest.approx((1 / 1.7, 2048 / 1.7, 1 / 1.7))
    twice = dataclasses.replace(PLAN, flops=2 * PLAN.flops)
    assert twice.speeds == PLAN.speeds  # what chips compute more than once is no use
    assert dataclasses.replace(PLAN, time=None).speeds == {}
    assert PLAN.as_dict()["speeds"]["best"] == {"steps": 1.0, "amount": 2048.0, "mfu": 1.0}


def test_plan_text_has_the_estimated_speed_and_what_it_assumes():
    lines = planning.plan_text(PLAN).splitlines()
    at = lines.index("Estimated speed             full overlap    no overlap")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["steps/s", "1", "0.588"],
        ["tokens/s", "2,048", "1,205"],
        ["MFU", "100.0", "%", "58.8", "%"],
    ]
    assert "upper bounds: no input, evaluations, checkpoints or latency" in lines[at + 4]
    assert "MFU: ideal matmul FLOPs, rematerialized ones included, over time x 197 TFLOP/s" in lines[at + 5]
    uncompiled = dataclasses.replace(PLAN, collectives=None, program="evaluation eval")
    text = planning.plan_text(uncompiled)
    assert "latency or collectives" in text
    assert "batches/s" in text


def test_plan_text_has_temporaries_with_operation_and_line():
    line = planning.plan_text(PLAN).splitlines()[-1]
    assert line.split() == ["4.00", "KiB", "f32[8,8]", "jit(step)/dot", "(subspace_jax/nn/linear.py:3)"]
    assert planning.plan_text(dataclasses.replace(PLAN, largest=())).find("temporaries\n  ") < 0


def test_what_does_not_fit_is_told_with_what_to_change():
    large = dataclasses.replace(PLAN, total=30 * 2**30, refusal="out of memory", time=None, collectives=None)
    text = planning.plan_text(large)
    assert "does not fit, 14.25 GiB too much" in text
    assert "the state takes 12.00 of 15.75 GiB on 8 shards (fsdp x tensor); with 16 shards" in text
    assert "halve data.batch_size" in text
    assert "The compiler refused the program: out of memory" in text


def test_a_sweep_names_the_fastest_that_fits(tmp_path):
    quick = dataclasses.replace(
        PLAN, topology="v5e:4x4", mesh=MESH | {"data": 2}, time=planning.Roofline(0.5, 0.1, 0.6)
    )
    no = dataclasses.replace(quick, mesh=MESH | {"fsdp": 8}, total=2**40, time=planning.Roofline(0.1, 0.1, 0.1))
    assert planning.best_plan([PLAN, quick, no]) is quick
    assert planning.best_plan([no]) is None
    text = planning.sweep_text([PLAN, quick, no])
    assert "Fastest that fits: v5e:4x4 with data=2, fsdp=4, tensor=2, 600.000 ms" in text
    assert "Fewest chip-seconds per example: v5e:2x4" in text
    planning.plot_sweep([PLAN, quick, no], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_rings_are_as_fast_as_their_links():
    v5e, h100 = planning.CHIPS["v5e"], planning.CHIPS["h100"]

    def seconds(kind, chip, devices=16):
        return planning.collective_seconds(chip, planning.Collective(kind, "fsdp", devices, 1, 16 * 10**9))

    # 15 of 16 shards pass each chip, on both links of a closed ring; a ring of 8 is a line on this chip.
    assert seconds("all-gather", v5e) == pytest.approx(15e9 / 100e9)
    assert seconds("all-reduce", v5e) == pytest.approx(2 * 15e9 / 100e9)
    assert seconds("all-gather", v5e, 8) == pytest.approx(14e9 / 50e9)
    assert seconds("collective-permute", v5e) == pytest.approx(16e9 / 50e9)
    assert seconds("all-to-all", h100) == pytest.approx(15e9 / 450e9)
