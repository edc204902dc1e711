"""Fine-tuning with hidden states that are decoupled from a domain: the fields ``decoupling`` of a config."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, language, nn, train
from subspace_jax.data import text
from subspace_jax.losses.decoupling import OnlineDecoupler
from tests.train.common import data_of
from tests.train.task_battery import TaskContract

from .conftest import LLAMA

CONFIG = nn.CausalLMConfig.gpt2(259, 32, 2, 2, max_length=64)
DECOUPLER = OnlineDecoupler(2, 1, every=1, probe_steps=4, capacity=64, per_step=32)


def packed(count=40):
    domains = ("plain", "loud")
    texts = [
        ("the quick fox " * (1 + i % 4)).upper() if i % 3 == 0 else "a lazy dog" * (1 + i % 4) for i in range(count)
    ]
    examples = [text.DomainCompletion("", t, domains[t.isupper()]) for t in texts]
    rows = text.pack_rows(examples, text.ByteTokenizer(), 32, domains=domains)
    return rows | {"weights": np.ones_like(rows["weights"])}  # all micro-batches weigh the same


@pytest.mark.slow
class TestDecoupledLM(TaskContract):
    deterministic = False  # the choice of states depends on the micro-batch
    atol = 1e-4  # as for the classifier: Adam of the probe divides by the size of a gradient

    def make(self):
        rows = packed()
        task = language.DecoupledLMTask(language.CausalLMTask(CONFIG), DECOUPLER, weight=0.1, layers=(1, -1))
        return task, data_of(rows, {name: x[:10] for name, x in rows.items()}, 8)


@pytest.mark.slow
class TestDecoupledAdapters(TestDecoupledLM):
    def make(self):
        rows = packed()
        rows |= {name: rows[name] % 96 for name in ("inputs", "labels")}  # the golden Llama has few tokens
        inner = language.AdaptedLMTask(interop.read_config(LLAMA), {"attn/q": adapters.LoRA(2, 4.0)}, folder=LLAMA)
        task = language.DecoupledLMTask(inner, DECOUPLER, weight=0.1, layers=())
        return task, data_of(rows, {name: x[:10] for name, x in rows.items()}, 8)


def test_decoupled_loss_is_that_of_the_task_and_the_mean_penalty_of_the_layers():
    inner = language.CausalLMTask(CONFIG)
    task = language.DecoupledLMTask(inner, DECOUPLER, weight=0.5, layers=(0, -1))
    rows = {name: jnp.asarray(x[:4]) for name, x in packed().items()}
    params, variables = task.init(jax.random.key(0))
    bases = jnp.stack([jnp.eye(32)[:, :1], jnp.eye(32)[:, 1:2]])
    variables["decoupler"] = variables["decoupler"]._replace(basis=bases)

    @jax.jit
    def both(params, variables):
        loss, (new, found) = task.loss(params, variables, rows, key=jax.random.key(1), step=0)
        plain, _ = inner.loss(params, {}, rows, key=jax.random.key(1), step=0)
        return loss, new, found, plain, task.states(params, variables, rows)

    loss, new, found, plain, states = both(params, variables)
    np.testing.assert_allclose(found["task_loss"], plain, rtol=1e-6)
    real = rows["domains"] >= 0
    lengths = [jnp.abs(states[i, ..., i])[real] for i in (0, 1)]
    np.testing.assert_allclose(found["penalty"], jnp.mean(jnp.stack(lengths)), rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 0.5 * found["penalty"], rtol=1e-6)
    # Each reservoir has the same positions of its own hidden state.
    reservoir = new["decoupler"]
    np.testing.assert_array_equal(reservoir.labels[0], reservoir.labels[1])
    states, kept = np.asarray(states), np.asarray(reservoir.states)
    for slot in (0, 31):
        found = [set(map(tuple, np.argwhere((states[i] == kept[i, slot]).all(axis=-1)))) for i in (0, 1)]
        same = found[0] & found[1]  # several where a text is there twice
        assert {int(rows["domains"][at]) for at in same} == {int(reservoir.labels[0, slot])}


@pytest.fixture
def config(tmp_path):
    rows = [{"text": f"the sum of {i} and {i} is {2 * i}.", "domain": ("low", "high")[i > 60]} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = language.default_config().unlock()
    config.data.source, config.data.holdout = str(tmp_path / "rows.jsonl"), 0.2
    config.data.length, config.data.batch_size, config.data.eval_batch_size = 32, 8, 8
    config.decoupling.target, config.decoupling.every, config.decoupling.probe_steps = "low", 2, 4
    config.train.steps, config.train.log_every = 3, 1
    return config.lock()


def test_pack_rows_gives_every_position_the_domain_of_its_text(config):
    rows = packed()
    assert set(np.unique(rows["domains"])) == {-1, 0, 1}
    np.testing.assert_array_equal(rows["domains"] == -1, rows["segment_ids"] == 0)
    is_upper = (rows["inputs"] >= 65) & (rows["inputs"] <= 90)
    assert np.all(rows["domains"][is_upper] == 1)
    with pytest.raises(ValueError, match=r"example 0: expected one of the domains \('a',\), got 'b'"):
        text.pack_rows([text.DomainCompletion("", "x", "b")], text.ByteTokenizer(), 8, domains=("a",))


def test_the_probe_of_hidden_states_is_tested_on_both_halves_of_the_examples():
    task = language.DecoupledLMTask(language.CausalLMTask(CONFIG), DECOUPLER, weight=0.1, layers=(-1,))
    finish = task.evaluators()["domains"].finish
    rng = np.random.default_rng(0)
    domains = rng.integers(-1, 2, (40, 8))
    states = rng.standard_normal((40, 8, 1, 3)).astype(np.float32)
    assert finish((states, domains))["probe_accuracy"] == pytest.approx(0.5, abs=0.12)
    states[..., 0, 0] += 20 * (2 * domains - 1)
    assert finish((states, domains))["weighted_probe_accuracy"] == 1
    states[::2, ..., 0, 0] *= -1  # what one half teaches is wrong of the other
    assert finish((states, domains))["probe_accuracy"] < 0.1
    assert np.isnan(finish((states, np.ones_like(domains)))["probe_accuracy"])


def test_rows_of_a_file_have_their_domain_and_are_held_out_without_it(config, tmp_path):
    examples = text.read_texts(config.data.source)
    assert examples[3] == ("", "the sum of 3 and 3 is 6.")
    assert [example.domain for example in examples] == ["low"] * 61 + ["high"] * 19
    bare = [text.Completion(*example) for example in examples]
    assert text.hold_out(examples, 0.2) == text.hold_out(bare, 0.2)


def test_a_plan_of_a_decoupled_run_needs_no_texts(config):
    (phase,) = language.finetune.outline(train.override(config, ["data.source=none.jsonl"])).phases
    assert isinstance(phase.task, language.DecoupledLMTask)
    assert phase.data.batch["domains"].shape == (8, 32)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
def test_finetune_decouples_by_a_config_and_exports_the_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    after = train.run(config, tmp_path / "run", progress=False)
    assert after.state.variables["decoupler"].basis.shape == (1, 128, 1)
    assert after.state.variables["decoupler"].basis.any()
    assert {"loss", "domains/probe_accuracy"} <= set(after.metrics)
    rows = [row for row in after.rows if row["split"] == "train"]
    assert [row["penalty"] > 0 for row in rows] == [False, False, True]
    assert rows[2]["loss"] == pytest.approx(rows[2]["task_loss"] + 0.01 * rows[2]["penalty"], rel=1e-5)
    language.export(tmp_path / "run", tmp_path / "model")
    assert interop.load_causal_lm(tmp_path / "model")[0].hidden_size == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["decoupling.target=middle"], r"decoupling.target: expected one of \('high', 'low'\), got 'middle'"),
        (["decoupling.weight=-1.0"], "decoupling.weight: expected a finite number at least 0, got -1"),
        (["decoupling.layers=(9,)"], r"decoupling.layers: expected hidden states 0 to 4, got \(9,\)"),
        (["decoupling.mode=svd"], "decoupling.mode: expected one of"),
    ],
)
def test_fields_of_decoupling_are_refused_by_name(config, settings, message):
    with pytest.raises(ValueError, match=message):
        language.finetune.build(train.override(config, settings))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": "b", "domain": "low"}], "1 of 2 examples have no domain"),
        ([{"text": c, "domain": "low"} for c in "abcd"], r"expected examples of at least two domains, got \['low'\]"),
        ([{"messages": [{"role": "assistant", "content": c}], "domain": "low"} for c in "ab"], "got conversations"),
    ],
)
def test_rows_without_domains_are_refused(config, tmp_path, rows, message):
    for name in ("rows", "others"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    settings = ["data.holdout=0.0", f"data.evaluation={tmp_path / 'others.jsonl'}"]
    settings.append(f"data.chat_template={tmp_path / 'chat.jinja'}")
    with pytest.raises(ValueError, match=f"decoupling: .*{message}"):
        language.finetune.build(train.override(config, settings))
