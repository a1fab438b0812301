import dataclasses

import pytest
import torch

from softtrellis.transforms.incoherence import (
    Incoherence,
    pack_signs,
    padded_size,
    unpack_signs,
    unrotate_weights,
)

LAYERS = [  # in, out, multiple, block
    (64, 64, 16, None),
    (64, 172, 16, None),
    (172, 64, 16, None),
    (172, 64, 1, None),
    (577, 31, 16, None),
    (577, 31, 1, None),
    (3, 1, 1, None),
    (1, 2, 16, None),
    (576, 192, 128, 128),
    (64, 172, 128, 128),
    (192, 576, 64, 64),
]


@pytest.fixture(params=LAYERS, ids=lambda layer: "-".join(map(str, layer)))
def rotation(request) -> Incoherence:
    in_features, out_features, multiple, block = request.param
    return Incoherence.random(in_features, out_features, seed=5, multiple=multiple, block=block)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def kurtosis(x: torch.Tensor) -> float:
    return (x.pow(4).mean() / x.square().mean().square()).item()


def test_rotated_layer_computes_the_same(rotation):
    w = randn(rotation.out_pad, rotation.in_pad)  # any rotated weight, not only a rotated W
    x = randn(5, rotation.in_features, seed=1)
    through = rotation.unrotate_output(rotation.rotate_input(x) @ w.mT)
    close(through, x @ rotation.unrotate_weight(w).mT)
    assert through.shape == (5, rotation.out_features)


def test_weight_round_trip_keeps_the_norm(rotation):
    w = randn(rotation.out_features, rotation.in_features)
    rotated = rotation.rotate_weight(w)
    assert rotated.shape == (rotation.out_pad, rotation.in_pad)
    assert rotated.is_contiguous()
    close(rotated.norm(), w.norm())
    close(rotation.unrotate_weight(rotated), w)


def test_rotated_weight_is_the_formula(rotation):
    def dense(rotate, size: int) -> torch.Tensor:  # columns: what becomes of the unit vectors
        return rotate(torch.eye(size, dtype=torch.float64)).mT

    w = randn(rotation.out_features, rotation.in_features)
    h_in = dense(rotation.rotate_input, rotation.in_features)
    h_out = dense(rotation.unrotate_output, rotation.out_pad).mT
    close(h_in.mT @ h_in, torch.eye(rotation.in_features, dtype=torch.float64))
    close(rotation.rotate_weight(w), h_out @ w @ h_in.mT)


def test_hessian_gives_the_same_proxy_loss(rotation):
    x = randn(40, rotation.in_features)
    hessian = x.mT @ x / 40
    error = randn(rotation.out_features, rotation.in_features, seed=1)
    rotated = rotation.rotate_hessian(hessian)
    rotated_error = rotation.rotate_weight(error)
    before = ((error @ hessian) * error).sum()
    after = ((rotated_error @ rotated) * rotated_error).sum()
    close(after / before, torch.ones((), dtype=torch.float64))
    assert torch.equal(rotated, rotated.mT)
    y = rotation.rotate_input(x)
    close(rotated, y.mT @ y / 40)


def test_spiky_weights_become_gaussian():
    w = randn(192, 576) * 0.01
    w[:, 7] = randn(192, seed=1)
    w[3] = randn(576, seed=2)
    rotated = Incoherence.random(576, 192, seed=0).rotate_weight(w)
    assert kurtosis(w) > 20
    assert kurtosis(rotated) < 4


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rotate_weight", (172, 64)),
        ("unrotate_weight", (176, 64)),
        ("rotate_input", (2, 64)),
        ("unrotate_output", (2, 176)),
    ],
)
def test_gradient_is_the_transpose(name, shape):
    rotate = getattr(Incoherence.random(64, 172, seed=0), name)
    x, other = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    y = rotate(x)
    upstream = randn(*y.shape, seed=2)
    (grad,) = torch.autograd.grad(y, x, upstream)
    close((grad * other).sum(), (upstream * rotate(other)).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    rotation = Incoherence.random(172, 64, seed=0)
    w = randn(64, 172).to(dtype)
    results = {
        "rotate_weight": rotation.rotate_weight(w),
        "unrotate_weight": rotation.unrotate_weight(randn(64, 176).to(dtype)),
        "rotate_input": rotation.rotate_input(w),
        "unrotate_output": rotation.unrotate_output(randn(3, 64).to(dtype)),
        "rotate_hessian": rotation.rotate_hessian((randn(172, 172)).to(dtype)),
    }
    assert {name: result.dtype for name, result in results.items()} == dict.fromkeys(results, dtype)
    exact = rotation.rotate_weight(w.double())
    torch.testing.assert_close(
        results["rotate_weight"].double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6
    )


def test_signs_come_from_the_seed():
    first, again, other = (Incoherence.random(577, 192, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.in_signs, again.in_signs)
    assert torch.equal(first.out_signs, again.out_signs)
    assert not torch.equal(first.in_signs, other.in_signs)
    assert first.in_signs.shape == (592,)
    assert 0.4 < (first.in_signs == 1).float().mean() < 0.6
    state = torch.get_rng_state()
    with torch.device("meta"):
        Incoherence.random(64, 64, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_gives_known_signs():
    """A seed may stand for its signs in a script, so it must keep its meaning."""
    rotation = Incoherence.random(32, 16, seed=0)
    assert pack_signs(rotation.in_signs).tolist() == [111, 228, 22, 122]
    assert pack_signs(rotation.out_signs).tolist() == [182, 95]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 577])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16])
def test_signs_round_trip(n, dtype):
    signs = torch.where(randn(n, seed=n) < 0, -1, 1).to(dtype)
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-n // 8),)
    assert torch.equal(unpack_signs(packed, n), signs.to(torch.int8))


def test_first_sign_is_the_most_significant_bit():
    assert pack_signs(torch.tensor([-1, 1, 1, 1, 1, 1, -1, 1, -1])).tolist() == [0b10000010, 0x80]


def test_damaged_or_wrong_signs_are_refused():
    with pytest.raises(ValueError, match="9 signs need uint8"):
        unpack_signs(torch.zeros(1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="damaged"):
        unpack_signs(torch.tensor([0, 1], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"\+1 or -1"):
        pack_signs(torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"\+1 or -1"):
        pack_signs(torch.tensor([1.0, float("nan")]))


def test_padding_is_counted():
    assert padded_size(172, 16) == 176
    assert padded_size(176, 16) == 176
    assert Incoherence.random(576, 1536, seed=0).bits_overhead == 1.0
    assert Incoherence.random(64, 172, seed=0).bits_overhead == 176 / 172
    blocks = Incoherence.random(64, 172, seed=0, multiple=128, block=128)
    assert blocks.bits_overhead == (256 * 128) / (172 * 64)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match=r"block=128 does not divide .*use multiple=128"):
        Incoherence.random(576, 192, seed=0, block=128)
    with pytest.raises(ValueError, match="block=172 has no Hadamard matrix"):
        Incoherence.random(172, 172, seed=0, multiple=172, block=172)
    with pytest.raises(ValueError, match="at least 1"):
        Incoherence.random(0, 16, seed=0)
    with pytest.raises(ValueError, match="block must be at least 1 or None, not 0"):
        Incoherence.random(16, 16, seed=0, block=0)
    good = Incoherence.random(16, 32, seed=0)
    with pytest.raises(ValueError, match=r"in_signs must have shape \[16\]"):
        dataclasses.replace(good, in_signs=good.out_signs)
    with pytest.raises(ValueError, match=r"out_signs must be \+1 or -1"):
        dataclasses.replace(good, out_signs=good.out_signs * 2)
    with pytest.raises(ValueError, match="one device"):
        dataclasses.replace(good, out_signs=good.out_signs.to("meta"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.block = 16


def test_wrong_shapes_and_devices_are_refused():
    rotation = Incoherence.random(64, 172, seed=0)
    with pytest.raises(ValueError, match=r"weight must be \[172, 64\], not \[64, 172\]"):
        rotation.rotate_weight(torch.ones(64, 172))
    with pytest.raises(ValueError, match=r"rotated weight must be \[176, 64\]"):
        rotation.unrotate_weight(torch.ones(172, 64))
    with pytest.raises(ValueError, match=r"input must be \[\.\.\., 64\]"):
        rotation.rotate_input(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"rotated output must be \[\.\.\., 176\]"):
        rotation.unrotate_output(torch.ones(172))
    with pytest.raises(ValueError, match=r"Hessian must be \[64, 64\]"):
        rotation.rotate_hessian(torch.ones(64))
    with pytest.raises(ValueError, match=r'\.to\("meta"\)'):
        rotation.rotate_input(torch.ones(64, device="meta"))


def test_to_moves_the_signs():
    moved = Incoherence.random(64, 172, seed=0).to("meta")
    assert moved.in_signs.is_meta
    assert moved.out_signs.is_meta
    assert moved.rotate_weight(torch.ones(172, 64, device="meta")).shape == (176, 64)


def test_stacks_are_unrotated_each_by_its_own_signs(rotation):
    others = [
        Incoherence.random(
            rotation.in_features,
            rotation.out_features,
            seed=seed,
            multiple=rotation.multiple,
            block=rotation.block,
        )
        for seed in (6, 7)
    ]
    rotations = [rotation, *others]
    weights = randn(3, rotation.out_pad, rotation.in_pad)
    found = unrotate_weights(rotations, weights)
    assert found.is_contiguous()
    for one, weight, alone in zip(found, weights, rotations, strict=True):
        close(one, alone.unrotate_weight(weight))


def test_stacks_that_do_not_fit_are_refused():
    one, other = Incoherence.random(64, 32, seed=0), Incoherence.random(32, 64, seed=0)
    with pytest.raises(ValueError, match="same sizes"):
        unrotate_weights([one, other], torch.ones(2, 32, 64))
    with pytest.raises(ValueError, match="2 rotated weights must be a stack"):
        unrotate_weights([one, one], torch.ones(3, 32, 64))
    with pytest.raises(ValueError, match=r"rotated weight must be \[32, 64\]"):
        unrotate_weights([one, one], torch.ones(2, 64, 32))
