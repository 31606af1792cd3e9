"""The head of prototypes against the formula in float64, its names, what is fixed in it, and half precision."""

import math

import numpy as np
import pytest
import torch

from ssl_eo.models.heads import HeadConfig, PrototypeHead

N, D, HIDDEN, BOTTLENECK, K = 7, 12, 20, 6, 9
SMALL = {"n_prototypes": K, "hidden_dim": HIDDEN, "bottleneck_dim": BOTTLENECK}


def built(**changes) -> PrototypeHead:
    """A head all of whose tensors are drawn, biases and lengths too."""
    head = PrototypeHead(D, HeadConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.normal_(generator=generator)
    return head


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def naive(head: PrototypeHead, x: torch.Tensor, n_layers: int) -> np.ndarray:
    """`[N, K]` in float64, written out in NumPy and loops."""
    state = {name: value.double().numpy() for name, value in head.state_dict().items()}
    logits = np.empty((len(x), K))
    for row, values in enumerate(x.double().numpy()):
        for i in range(n_layers):
            values = state[f"mlp.{2 * i}.weight"] @ values + state[f"mlp.{2 * i}.bias"]
            if i < n_layers - 1:  # exact GELU between the layers, none before the prototypes
                values = np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in values])
        values = values / np.linalg.norm(values)
        for k, direction in enumerate(state["last_layer.weight_v"]):
            logits[row, k] = state["last_layer.weight_g"][k, 0] * (direction @ values) / np.linalg.norm(direction)
    return logits


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("learned_norm", [True, False])
def test_value_is_the_formula(n_layers: int, learned_norm: bool) -> None:
    head, x = built(n_layers=n_layers, learned_norm=learned_norm), drawn(N, D)
    found = head(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), naive(head, x, n_layers), rtol=2e-5, atol=2e-6)


def test_state_dict_is_that_of_dinov2() -> None:
    """Names and shapes, biases only in the MLP; `weight_g` has its place whether it is learned or not."""
    expected = {
        "mlp.0.weight": (HIDDEN, D),
        "mlp.0.bias": (HIDDEN,),
        "mlp.2.weight": (HIDDEN, HIDDEN),
        "mlp.2.bias": (HIDDEN,),
        "mlp.4.weight": (BOTTLENECK, HIDDEN),
        "mlp.4.bias": (BOTTLENECK,),
        "last_layer.weight_g": (K, 1),
        "last_layer.weight_v": (K, BOTTLENECK),
    }
    heads = [PrototypeHead(D, HeadConfig(**SMALL, learned_norm=learned)) for learned in (True, False)]
    for head in heads:
        assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == expected
    learned, fixed = ({name for name, _ in head.named_parameters()} for head in heads)
    assert learned == set(expected)
    assert fixed == set(expected) - {"last_layer.weight_g"}


def test_the_default_is_the_head_of_dinov2_vit_b() -> None:
    with torch.device("meta"):
        head = PrototypeHead(768, HeadConfig())
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(23.1e6, abs=5e4)


def test_a_length_that_is_not_learned_stays_one() -> None:
    head = PrototypeHead(D, HeadConfig(**SMALL, learned_norm=False))
    head.init_weights()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        head(drawn(N, D)).square().sum().backward()
        optimizer.step()
    assert torch.equal(head.last_layer.weight_g, torch.ones(K, 1))
    assert head(drawn(N, D)).abs().max() <= 1 + 1e-6  # cosines
    weights = PrototypeHead(D, HeadConfig(**SMALL))  # they load into a head whose lengths are learned, and back
    weights.load_state_dict(head.state_dict())
    head.load_state_dict(weights.state_dict())


def test_init_fills_everything_as_dinov2_does() -> None:
    with torch.device("meta"):
        head = PrototypeHead(256, HeadConfig(n_prototypes=512, hidden_dim=256, bottleneck_dim=64))
    head.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    head.init_weights()
    state = head.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    for name in ("mlp.0", "mlp.2", "mlp.4"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert not state[f"{name}.bias"].any()
    assert torch.equal(state["last_layer.weight_g"], torch.ones(512, 1))
    length = state["last_layer.weight_v"].norm(dim=1)
    assert length.min() > 0
    direction = state["last_layer.weight_v"] / length[:, None]
    assert direction.mean(0).abs().max() < 0.03  # prototypes point everywhere
    torch.manual_seed(0)
    head.init_weights()
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


def test_gradients_are_those_of_the_formula() -> None:
    head = built().double()
    assert torch.autograd.gradcheck(head, (drawn(3, D).double().requires_grad_(),))
    names = [name for name, _ in head.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in head.parameters())
    x = drawn(3, D).double()

    def call(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, values)


def test_half_precision_keeps_unit_length() -> None:
    """To the precision of bfloat16, however long or short what is normalised."""
    for factor in (1e-8, 1.0, 1e8):
        head = built(learned_norm=False)
        with torch.no_grad():
            head.mlp[-1].weight.mul_(factor)
            head.mlp[-1].bias.mul_(factor)
            head.last_layer.weight_g.fill_(1.0)
        seen = []
        head.last_layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(drawn(N, D))
        assert seen[0].dtype == logits.dtype == torch.bfloat16
        torch.testing.assert_close(seen[0].float().norm(dim=-1), torch.ones(N), rtol=2**-8, atol=0)
        assert (logits.float() - head(drawn(N, D))).abs().max() < 0.03


@pytest.mark.parametrize("key", ["n_prototypes", "hidden_dim", "bottleneck_dim", "n_layers"])
def test_config_ranges(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be at least 1, got 0"):
        HeadConfig(**{key: 0})
