import dataclasses
import os

import optax

from subspace_jax import planning, train

from ..train.common import regression, run_of


def test_plan_here_is_the_memory_of_the_compiled_step(tmp_path):
    task, data = regression()
    run = run_of(
        task, optax.sgd(0.1, momentum=0.9), data, num_steps=4, mesh=train.make_mesh(), workdir=tmp_path / "run"
    )
    (plan,) = planning.plan_here(run)
    assert (plan.program, plan.topology, plan.examples) == ("step", "1 x cpu", 16)
    assert (plan.params, plan.optimizer, plan.batch) == (32, 32, 16 * 9 * 4)
    assert plan.total == plan.arguments + plan.padding + plan.temporaries + plan.code
    assert 0 < plan.temporaries < plan.limit <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert planning.memory_text(plan).endswith("free")
    assert not (tmp_path / "run").exists()
    step = train.jit_train_step(task, run.phases[0].tx, run.mesh)
    abstract, _ = train.state_shardings(task, run.phases[0].tx, run.mesh)
    assert plan.temporaries == step.lower(abstract, dict(data.batch)).compile().memory_analysis().temp_size_in_bytes


def test_plan_here_plans_a_step_of_several_phases_once():
    task, data = regression()
    first = train.Phase("first", task, data, 4, optax.sgd(0.1))
    phases = (first, first._replace(name="second"), first._replace(name="third", data=lambda state: data, tx=None))
    run = dataclasses.replace(run_of(task, first.tx, data, num_steps=4, mesh=train.make_mesh()), phases=phases)
    assert [plan.program for plan in planning.plan_here(run)] == ["step of first"]
