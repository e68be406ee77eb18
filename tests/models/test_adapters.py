"""Adapters: what is accepted, what a new one must not change, and the outputs of a merged one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.models import adapter_files, adapters
from rpo_trainer.models.adapter_methods import changes_base, is_adapted, require_supported_adapter
from rpo_trainer.models.loading import load_weights
from rpo_trainer.step.layout_probe import probe
from tests.families import tiny_model
from tests.raising import raises
from tests.small_models import make_model
from tests.step.test_forward import compare, plain_logprobs, random_examples

peft = pytest.importorskip("peft")

IDS = torch.arange(4, 20)[None]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **settings})


def stirred(model: Any, seed: int = 0) -> Any:
    """Return the model with every trainable parameter changed, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
    return model


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.log_softmax(-1)


TIED = {"tie_word_embeddings": True}
# Trained parts, and the model's own settings.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (lambda: lora(), {}),
    "all-linear": (lambda: lora(target_modules="all-linear"), {}),
    "head": (lambda: lora(target_modules=["lm_head", "q_proj"]), {}),
    "tied head": (lambda: lora(target_modules=["lm_head", "q_proj"]), TIED),
    "tied head, tied adapters": (
        lambda: lora(target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True), TIED,
    ),
    "embeddings": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), {}),
    "tied embeddings": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), TIED),
    "head saved": (lambda: lora(modules_to_save=["lm_head"]), {}),
    "tied head saved": (lambda: lora(modules_to_save=["lm_head"]), TIED),
    "both saved": (lambda: lora(modules_to_save=["lm_head", "embed_tokens"]), TIED),
    "new tokens": (lambda: lora(trainable_token_indices=[5, 6]), TIED),
    "DoRA": (lambda: lora(use_dora=True), {}),
    "DoRA on the head": (lambda: lora(use_dora=True, target_modules=["lm_head", "v_proj"]), TIED),
    "rsLoRA": (lambda: lora(use_rslora=True), {}),
    "patterns": (lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), {}),
    "biases": (lambda: lora(bias="all"), {"attention_bias": True}),
    "bias of the adapter": (lambda: lora(lora_bias=True), {"attention_bias": True}),
    "IA3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ), {},
    ),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2), {}),
    "OFT": (lambda: peft.OFTConfig(target_modules=["q_proj"], r=2, oft_block_size=0), {}),
}  # fmt: skip


# --- the packed step, and the probe ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_step_equals_plain_forwards_through_peft(kind: str) -> None:
    config, settings = KINDS[kind]
    model = stirred(
        peft.get_peft_model(make_model(dtype=torch.float64, **settings), config()).double()
    ).eval()
    compare(model, random_examples(6), "shared", rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["head", "tied head saved", "DoRA", "rsLoRA", "IA3"])
def test_the_probe_passes_and_leaves_the_adapter_as_it_was(kind: str) -> None:
    config, settings = KINDS[kind]
    model = adapters.with_adapter(make_model(**settings), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapters.randomized_zero_init(model):
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
        layout, head = probe(model)
    assert bool(changed) == (kind not in ("IA3",))
    assert (layout, head.fused) == ("shared", True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_path_through_a_fresh_adapter_is_seen_only_with_randomized_zeros() -> None:
    model = adapters.with_adapter(make_model(), lora())
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):  # each position gets that of the next token
            module.register_forward_hook(lambda m, i, o: o.roll(1, -2))
    assert probe(model)[0] == "shared"
    with adapters.randomized_zero_init(model):
        try:
            layout = probe(model)[0]
        except ModelError:
            layout = "none"
    assert layout != "shared"


# --- what is accepted ---


def prompt_learning() -> list[Any]:
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    return [
        peft.PrefixTuningConfig(**common),
        peft.PromptTuningConfig(**common),
        peft.PromptEncoderConfig(**common),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("wrapped", [False, True])
def test_prompt_learning_is_refused_with_the_reason(number: int, wrapped: bool) -> None:
    config, model = prompt_learning()[number], make_model()
    model = peft.get_peft_model(model, config) if wrapped else model
    with raises("adapter.unsupported-method", ModelError) as error:
        require_supported_adapter(model) if wrapped else adapters.with_adapter(model, config)
    assert str(config.peft_type.value) in error.value.what and "LoRA" in str(error.value.fix)
    assert "virtual tokens" in str(error.value.why)


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
         "unsupported-method", "ADALORA.*regularizer"),
        (lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1),
         "unsupported-method", "ADAPTION_PROMPT"),
        (lambda: lora(alora_invocation_tokens=[5]), "unsupported-method", "activated LoRA"),
        (lambda: lora(init_lora_weights=False), "random-start", ""),
        (lambda: lora(init_lora_weights="eva"), "data-start", "eva"),
        (lambda: lora(init_lora_weights="corda"), "data-start", "corda"),
        (lambda: lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
         "data-start", "lora_ga"),
        (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "changes-model", "nats"),
        (lambda: lora(target_modules=["nowhere"]), "bad-config", "nowhere"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused(config: Any, code: str, words: str) -> None:
    with raises(f"adapter.{code}", ModelError) as error:
        adapters.with_adapter(make_model(), config())
    assert re.search(words, str(error.value), flags=re.DOTALL), str(error.value)


def routed(family: str) -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family, vocab_size=61, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
            head_dim=8, intermediate_size_mlp=16, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("family", ["llama4_text", "phimoe"])
def test_routers_among_the_targets_are_named(family: str) -> None:
    with raises("adapter.forward-fails", ModelError) as error:
        adapters.with_adapter(routed(family), lora(target_modules="all-linear"))
    assert "router" in error.value.what
    excluded = lora(target_modules="all-linear", exclude_modules=["router"])
    assert is_adapted(adapters.with_adapter(routed(family), excluded))


FUSED = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "llama4_text": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_experts_that_are_left_as_they_are_are_named(
    family: str, targets: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With the names in the warning, the experts of all layers are trained, and there is no warning."""
    if (family, targets) == ("mixtral", "all-linear"):
        pytest.skip("PEFT turns this into target_parameters of its own")
    excluded = {"exclude_modules": ["router", "gate"]} if targets == "all-linear" else {}
    adapters.with_adapter(routed(family), lora(target_modules=targets, **excluded))
    (said,) = [r.getMessage() for r in caplog.records if "target_parameters" in r.getMessage()]
    names = said.rpartition("[")[2].rstrip("]").split(", ")
    assert names == FUSED[family]
    caplog.clear()
    start = routed(family)
    wrapped = adapters.with_adapter(
        start, lora(target_modules=targets, target_parameters=names, **excluded)
    )
    assert "target_parameters" not in caplog.text
    before = {n: p.clone() for n, p in wrapped.named_parameters()}
    experts = [n for n, p in wrapped.named_parameters() if p.requires_grad and ".experts." in n]
    assert len(experts) == 2 * 2 * len(names)  # A and B of each in two layers
    stirred(wrapped)
    expected = wrapped(input_ids=IDS).logits
    plain = adapters.merged(wrapped)
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    moved = [n for n, p in plain.named_parameters() if n.endswith(tuple(names))]
    assert len(moved) == 2 * len(names)
    for n in moved:
        base = next(
            p for old, p in before.items() if re.sub(r"(\.base_layer)+", "", old).endswith(n)
        )
        assert not torch.equal(plain.get_parameter(n), base)


def test_there_is_no_warning_where_no_expert_is_left(caplog: pytest.LogCaptureFixture) -> None:
    adapters.with_adapter(make_model(), lora(target_modules="all-linear"))
    wrapped = adapters.with_adapter(routed("mixtral"), lora(target_modules="all-linear"))
    assert any(".experts." in n and p.requires_grad for n, p in wrapped.named_parameters())
    assert "target_parameters" not in caplog.text


def test_grouped_layers_among_the_targets_are_named() -> None:
    with raises("adapter.forward-fails", ModelError) as error:
        adapters.with_adapter(tiny_model("deepseek_v4"), lora(target_modules="all-linear"))
    assert "o_a_proj" in error.value.what
    excluded = lora(target_modules="all-linear", exclude_modules=["o_a_proj"])
    assert is_adapted(adapters.with_adapter(tiny_model("deepseek_v4"), excluded))


def old_experts(folder: Path, *, without: str = "nothing") -> None:
    """A LoRA adapter of Mixtral with the names of transformers 4: one pair for each expert."""
    config = peft.LoraConfig(
        r=2, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM",
        base_model_name_or_path="base",
    )  # fmt: skip
    config.save_pretrained(folder)
    tensors = {}
    for layer, expert in ((layer, expert) for layer in range(2) for expert in range(4)):
        for name, (width, out) in {"w1": (32, 16), "w2": (16, 32), "w3": (32, 16)}.items():
            stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, width)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2)
    kept = {name: t for name, t in tensors.items() if without not in name}
    save_file(kept, folder / adapter_files.WEIGHTS)


def test_experts_as_transformers_4_names_them(tmp_path: Path) -> None:
    old_experts(tmp_path)
    model = adapters.load_adapter(routed("mixtral"), tmp_path, trainable=True)
    torch.manual_seed(0)
    below = routed("mixtral")
    below.load_state_dict(adapters._base_state(model), strict=False)
    assert (logps(model) - logps(below)).abs().max() > 0.01
    with torch.device("meta"):
        unread = routed("mixtral")
    adapters.check_unread(tmp_path, unread, "here")
    old_experts(tmp_path, without="layers.1.")
    with raises("adapter.tensor-mismatch", ModelError) as error:
        adapters.load_adapter(routed("mixtral"), tmp_path, trainable=True)
    assert all("layers.1." in name for name in error.value.details["missing"])


def test_loftq_is_refused_by_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoftQ fits the adapter to the quantization error of the base: together they are not the model."""
    from peft.tuners.lora import LoraLayer

    def rounded(self: Any, name: str, config: Any) -> None:
        self.get_base_layer().weight.data = (self.get_base_layer().weight * 4).round() / 4

    monkeypatch.setattr(LoraLayer, "loftq_init", rounded)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with raises("adapter.changes-model", ModelError):
        adapters.with_adapter(make_model(), config)


STARTS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora", "mica"]


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_leave_the_model_as_it_is(start: Any) -> None:
    try:
        config = lora(init_lora_weights=start)
        torch.manual_seed(0)
        model = adapters.with_adapter(make_model(), config)
    except ModelError:
        if start == "mica":
            pytest.skip("this PEFT does not know it")
        raise
    torch.testing.assert_close(logps(model), logps(make_model()), rtol=0, atol=1e-4)
    base = make_model().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    below = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    changed = str(start).startswith(("pissa", "olora"))
    assert torch.equal(base, below) != changed
    assert changes_base(config) == changed


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    model: Any = adapters.with_adapter(make_model(dtype=torch.bfloat16), lora())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert probe(model)[0] == "shared"


def test_a_mixed_model_is_refused() -> None:
    model = peft.get_peft_model(make_model(), lora(), mixed=True)
    with raises("adapter.unsupported-method", ModelError) as error:
        require_supported_adapter(model)
    assert "PeftMixedModel" in error.value.what


# --- a policy that still equals its base ---


def test_a_fresh_adapter_starts_as_its_base() -> None:
    base = make_model()
    for config in (lora(), lora(use_dora=True), lora(modules_to_save=["lm_head"])):
        model = adapters.with_adapter(copy.deepcopy(base), config)
        assert adapters.starts_as(model, base)
        assert not adapters.starts_as(model, make_model(seed=1))
        assert not adapters.starts_as(stirred(model), base)
    assert not adapters.starts_as(base, base)  # nothing to compare
    moved = adapters.with_adapter(copy.deepcopy(base), lora(init_lora_weights="pissa"))
    assert not adapters.starts_as(moved, base)  # equal up to rounding: treated as different


# --- merging ---


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bias of the adapter"])
def test_the_merged_model_says_the_same_on_disk_too(kind: str, tmp_path: Path) -> None:
    config, settings = KINDS[kind]
    model = stirred(peft.get_peft_model(make_model(**settings), config()))
    expected = logps(model)
    assert (expected - logps(make_model(**settings))).abs().max() > 0.01
    merged = adapters.merged(model)
    torch.testing.assert_close(logps(merged), expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logps(read), expected, rtol=0, atol=1e-4)
    tied = read.lm_head.weight is read.model.embed_tokens.weight
    apart = ("tied head", "tied embeddings", "tied head saved", "both saved", "DoRA on the head")
    assert tied == (settings == TIED and kind not in apart)


def test_a_merge_that_changes_the_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(peft.get_peft_model(make_model(), lora()))
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda self: self.unload())
    with raises("adapter.merge-changes-model", ModelError):
        adapters.merged(model)


# --- on disk ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = stirred(adapters.with_adapter(make_model(), lora(task_type="CAUSAL_LM")))
    model.get_base_model().save_pretrained(tmp_path / "unused")
    model.save_pretrained(tmp_path / "run" / "adapter")
    make_model().save_pretrained(tmp_path / "run" / "base")
    adapter_files.write_base(tmp_path / "run" / "adapter", "../base")
    return tmp_path / "run" / "adapter"


def test_an_adapter_is_read_back(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [adapter_files.CONFIG, adapter_files.WEIGHTS]
    assert adapter_files.is_adapter(saved) and not adapter_files.is_adapter(saved.parent / "base")
    assert adapter_files.base_of(saved) == str(saved.parent / "base")
    expected = logps(stirred(adapters.with_adapter(make_model(), lora())))
    for trainable in (True, False):
        model = adapters.load_adapter(make_model(), saved, trainable=trainable)
        assert any(p.requires_grad for p in model.parameters()) == trainable
        torch.manual_seed(0)
    model = adapters.load_adapter(make_model(), saved, trainable=True)
    assert logps(model).shape == expected.shape


def test_what_cannot_be_read_is_reported(saved: Path) -> None:
    with raises("adapter.cannot-load", ModelError, where=str(saved)):
        adapters.load_adapter(make_model(hidden_size=64), saved, trainable=True)
    adapter_files.require_same_config(saved, {"r": 4, "target_modules": ["v_proj", "q_proj"]})
    adapter_files.require_same_config(
        saved, {"target_modules": "all-linear", "init_lora_weights": "pissa"}
    )
    with raises("adapter.config-mismatch", RecipeError, where=str(saved)) as error:
        adapter_files.require_same_config(saved, {"r": 8})
    assert re.findall(r"\br\b|\d+", error.value.what) == ["r", "4", "8"]
    adapter_files.write_base(saved, "some/hub-name")
    assert adapter_files.base_of(saved) == "some/hub-name"
    adapter_files.write_base(saved, "")
    with raises("adapter.no-base", ModelError):
        adapter_files.base_of(saved)


def test_other_files_next_to_an_adapter(saved: Path) -> None:
    make_model().config.save_pretrained(saved)  # as some programs save it
    save_file({"x": torch.ones(2)}, saved / "draft.safetensors")
    assert adapter_files.is_adapter(saved)
    adapters.load_adapter(make_model(), saved, trainable=True)
    with raises("model.adapter-in-directory", ModelError):
        load_weights(saved)
    make_model().save_pretrained(saved)
    assert not adapter_files.is_adapter(saved)


def _without(folder: Path, part: str) -> None:
    tensors = load_file(folder / adapter_files.WEIGHTS)
    kept = {name: t for name, t in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / adapter_files.WEIGHTS)


def _with_more(folder: Path) -> None:
    tensors = load_file(folder / adapter_files.WEIGHTS)
    more = {"base_model.model.model.layers.7.q_proj.lora_A.weight": torch.ones(2, 2)}
    save_file({**tensors, **more}, folder / adapter_files.WEIGHTS)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / adapter_files.WEIGHTS), folder / "adapter_model.bin")
    (folder / adapter_files.WEIGHTS).unlink()


def _cut(folder: Path) -> None:
    path = folder / adapter_files.WEIGHTS
    path.write_bytes(path.read_bytes()[:200])


INCOMPLETE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a tensor missing": (
        lambda f: _without(f, "layers.1.self_attn.q_proj.lora_B"),
        "missing", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
    ),
    "a whole module missing": (
        lambda f: _without(f, "model.norm"), "missing", "base_model.model.model.norm",
    ),
    "one more": (_with_more, "unknown", "base_model.model.model.layers.7.q_proj.lora_A.weight"),
    "pickled": (_pickled, "", "adapter_model.bin"),
    "cut": (_cut, "", "damaged"),
    "no weights": (lambda f: (f / adapter_files.WEIGHTS).unlink(), "", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_adapter_is_refused(case: str, tmp_path: Path) -> None:
    """PEFT warns and initializes the missing weights, or looks for them on the hub."""
    spoil, kind, named = INCOMPLETE[case]
    config = lora(task_type="CAUSAL_LM", modules_to_save=["norm"])
    stirred(adapters.with_adapter(make_model(), config)).save_pretrained(tmp_path)
    adapters.load_adapter(make_model(), tmp_path, trainable=False)
    spoil(tmp_path)
    code = "adapter.tensor-mismatch" if kind else "adapter.unusable-weights"
    with raises(code, ModelError) as error:
        adapters.load_adapter(make_model(), tmp_path, trainable=False)
    assert named in str(error.value) and error.value.fix
    if kind:
        assert [name.startswith(named) for name in error.value.details[kind]] == [True]


def test_an_adapter_of_embeddings_is_complete(tmp_path: Path) -> None:
    """PEFT also saves the weights below it."""
    config = lora(task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head", "q_proj"])
    stirred(adapters.with_adapter(make_model(), config)).save_pretrained(tmp_path)
    adapters.load_adapter(make_model(), tmp_path, trainable=False)


def test_a_changed_base_is_not_changed_again_when_it_is_read(tmp_path: Path) -> None:
    model: Any = stirred(adapters.with_adapter(make_model(), lora(init_lora_weights="pissa")))
    expected = logps(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrong = logps(adapters.load_adapter(read, tmp_path / "adapter", trainable=False))
    assert (wrong - expected).abs().max() > 0.01  # PEFT copies it from the base again
    adapter_files.write_base(tmp_path / "adapter", "../base", plain_start=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    right = logps(adapters.load_adapter(read, tmp_path / "adapter", trainable=False))
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / adapter_files.CONFIG).read_text())["r"] == 4


def test_plain_logprobs_is_not_the_packed_step() -> None:
    """The other side of the comparison above, without packing."""
    model = make_model()
    assert len(plain_logprobs(model, random_examples(1))) > 0
    assert not hasattr(model, "_rpo_stock")
