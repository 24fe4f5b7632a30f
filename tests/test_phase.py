"Local phases and their uses: every block equals its formula, sees no future, and is finite on silence."
import math
import numpy as np, pytest, torch
import torch.nn.functional as F
from conftest import needs_data
from seqrec_nb.blocks.modulation import StepModulator, UserModulator, burst, modulate
from seqrec_nb.blocks.phase import (PhaseBank, Phases, SoftGate, alignment, amplitude, delayed_sum, phase_step, polar,
                                    relative, rotate, running_mean)
from seqrec_nb.core import reseed

BATCH, WIDTH = 3, 16
LENGTHS = [1, 2, 7, 13, 50]

@pytest.fixture(autouse=True)
def seeded(): reseed(0, 'test phase')

def inputs(L=13, dtype=torch.float32): return torch.randn(BATCH, L, WIDTH, dtype=dtype)
def all_real(L): return torch.ones(BATCH, L, dtype=torch.bool)
def right_padded(L):
    "Rows of every kind: full, half, empty"
    return torch.arange(L) < torch.tensor([[L], [(L + 1) // 2], [0]])

def depthwise(bank, x):
    "The published bank: two depthwise convolutions per band, then the mean over the channels"
    parts = []
    for weights in (bank.real, bank.imag):
        for w, k, d in zip(weights, bank.kernels, bank.dilations):
            y = F.conv1d(F.pad(x.mT, ((k - 1) * d, 0)), w[:, None], dilation=d, groups=len(w))
            parts.append(y.mean(1))
    return torch.stack(parts, -1).chunk(2, -1)

def angles(p): return torch.atan2(p.sin, p.cos)
def phases_of(phi): return Phases(phi.cos(), phi.sin(), torch.ones_like(phi))
def close(a, b, atol=1e-6): return torch.allclose(a, b, rtol=0, atol=atol)

# ---- the bank ----

@pytest.mark.parametrize('L', LENGTHS)
def test_bank_equals_depthwise_convolutions(L):
    bank, x = PhaseBank(WIDTH), inputs(L)
    for ours, theirs in zip(bank.parts(x), depthwise(bank, x)): assert close(ours, theirs)

@pytest.mark.parametrize('L', LENGTHS)
def test_phase_and_magnitude_equal_atan2(L):
    "In float64, in which 1e-8 is no rounding"
    bank, x = PhaseBank(WIDTH).double(), inputs(L, torch.float64)
    u, v = depthwise(bank, x)
    phi, p = torch.atan2(v, u + 1e-8), bank(x)
    assert close(p.cos, phi.cos(), 1e-12) and close(p.sin, phi.sin(), 1e-12)
    assert close(p.magnitude, (u * u + v * v + 1e-8).sqrt(), 1e-12)

@pytest.mark.parametrize('kernels,dilations', [((1,), (1,)), ((5, 2), (3, 60)), ((4, 4, 4), (1, 1, 7))])
def test_bank_with_other_bands_and_its_gradients(kernels, dilations):
    bank, x = PhaseBank(WIDTH, kernels, dilations).double(), inputs(dtype=torch.float64).requires_grad_()
    def gradients(u, v): return torch.autograd.grad((u * v + u.sin()).sum(), [x, *bank.real, *bank.imag])
    for a, b in zip(gradients(*bank.parts(x)), gradients(*depthwise(bank, x))): assert close(a, b, 1e-12)

@pytest.mark.parametrize('n,L,delta', [(1, 1, 1), (1, 5, 3), (4, 6, 2), (3, 2, 5), (7, 50, 8)])
def test_delayed_sum_equals_a_loop(n, L, delta):
    p, want = torch.randn(2, n, L), torch.zeros(2, L)
    for j in range(n):
        for t in range(L - j * delta): want[:, t + j * delta] += p[:, j, t]
    assert close(delayed_sum(p, delta), want)

def test_no_band_sees_the_future_or_beyond_its_reach():
    bank, x = PhaseBank(WIDTH), inputs(50)
    y = x.clone(); y[:, 20] = torch.randn(BATCH, WIDTH)
    for a, b in zip(bank(x)[:3], bank(y)[:3]):
        assert torch.equal(a[:, :20], b[:, :20])
        for s, (k, d) in enumerate(zip(bank.kernels, bank.dilations)):
            seen = {20 + j * d for j in range(k)} & set(range(50))
            assert set((a != b)[..., s].any(0).nonzero().flatten().tolist()) <= seen
            assert (a != b)[:, 20, s].all()

def test_a_broken_future_does_not_reach_back():
    bank, x = PhaseBank(WIDTH), inputs()
    y = x.clone(); y[:, 9:] = torch.nan
    for a, b in zip(bank(x)[:3], bank(y)[:3]): assert torch.equal(a[:, :9], b[:, :9])

def test_window_and_zero_padding_do_not_matter():
    bank, x = PhaseBank(WIDTH), inputs()
    for a, b, c in zip(bank(x), bank(x[:, :8]), bank(F.pad(x, (0, 0, 11, 0)))):
        if a is None: continue
        assert close(a[:, :8], b, 1e-5) and close(a, c[:, 11:], 1e-5)

@pytest.mark.parametrize('scale', [1, 1e-6, 1e6])
def test_hand_has_length_one_and_magnitude_a_floor(scale):
    p = PhaseBank(WIDTH)(scale * inputs())
    assert close(p.cos ** 2 + p.sin ** 2, torch.ones(BATCH, 13, 4)) and (p.magnitude >= 1e-4).all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_silence_is_phase_zero_with_finite_gradients(dtype):
    bank, x = PhaseBank(WIDTH).to(dtype), torch.zeros(BATCH, 7, WIDTH, dtype=dtype, requires_grad=True)
    p = bank(x)
    assert (p.cos == 1).all() and (p.sin == 0).all() and close(p.magnitude, torch.full_like(p.cos, 1e-4), 1e-9)
    (p.cos.sum() + p.sin.sum() + p.magnitude.sum() + phase_step(p)).backward()
    assert all(z.grad.isfinite().all() for z in [x, *bank.parameters()])

def test_the_one_bad_point_is_finite():
    u, v = torch.tensor([-1e-8, -1e-8, 0.], requires_grad=True), torch.tensor([0., 1e-30, -0.], requires_grad=True)
    p = polar(u, v)
    sum(z.sum() for z in p[:3]).backward()
    assert all(z.isfinite().all() for z in (*p[:3], u.grad, v.grad))

def test_dead_taps_get_no_gradient_and_are_never_read():
    bank, x = PhaseBank(WIDTH), inputs(50)
    assert [k - n for k, n in zip(bank.kernels, bank.live(50))] == [0, 0, 2, 24]
    assert bank.live(1) == [1] * 4 and bank.live(250) == [3, 7, 15, 31]
    before = bank(x)
    (before.cos + before.sin + before.magnitude).sum().backward()
    for w, n in zip([*bank.real, *bank.imag], 2 * bank.live(50)):
        assert (w.grad[:, :-n] == 0).all() and (w.grad[:, -n:] != 0).all()
        with torch.no_grad(): w[:, :-n] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(before[:3], bank(x)[:3]))

def test_weights_start_like_those_of_the_convolution():
    "From the same seed, they are its weights"
    for k in (3, 7, 15, 31):
        reseed(1); ours = PhaseBank(64, (k,), (1,)).real[0]
        reseed(1); theirs = torch.nn.Conv1d(64, 64, k, groups=64, bias=False).weight[:, 0]
        assert close(ours, theirs) and .9 * k ** -.5 < ours.abs().max() <= k ** -.5

def test_number_of_parameters():
    assert sum(p.numel() for p in PhaseBank(64).parameters()) == 7168
    assert sorted(PhaseBank(8, (3, 5), (1, 2)).state_dict()) == ['imag.0', 'imag.1', 'real.0', 'real.1']

@pytest.mark.parametrize('kernels,dilations,text', [((3, 7), (1,), '2 kernels, 1 dilations'), ((), (), 'every band'),
                                                    ((0,), (1,), 'at least 1'), ((3,), (0,), 'at least 1')])
def test_wrong_bands_are_named(kernels, dilations, text):
    with pytest.raises(ValueError, match=text): PhaseBank(8, kernels, dilations)

@pytest.mark.parametrize('period', [4, 9, 10])
def test_a_pure_tone_has_constant_magnitude_and_linear_phase(period):
    bank, turn = PhaseBank(1, (period,), (1,)).double(), 2 * math.pi / period
    with torch.no_grad():
        for w, f in ((bank.real[0], torch.cos), (bank.imag[0], torch.sin)): w[0] = f(turn * torch.arange(period).flip(0))
    t = torch.arange(40., dtype=torch.float64)
    p = bank((turn * t + .3).cos()[None, :, None])
    settled = slice(period - 1, None)
    assert close(p.magnitude[0, settled, 0], torch.full_like(t[settled], period / 2), 1e-6)
    assert close(p.cos[0, settled, 0], (turn * t[settled] + .3).cos(), 1e-6)
    assert close(p.sin[0, settled, 0], (turn * t[settled] + .3).sin(), 1e-6)

@pytest.mark.parametrize('what', ['bf16 autocast', 'bf16 input', 'bf16 weights'])
def test_bank_computes_in_float32(what):
    bank, x = PhaseBank(WIDTH), inputs().bfloat16().float()
    want = bank(x)
    if what == 'bf16 weights':
        bank.bfloat16(); want = bank.float()(x); bank.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=what == 'bf16 autocast'):
        p = bank(x if what == 'bf16 autocast' else x.bfloat16())
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(p[:3], want[:3]))

def test_bank_on_no_device(): assert PhaseBank(8).to('meta')(torch.empty(2, 5, 8, device='meta')).cos.shape == (2, 5, 4)

# ---- how fast phases turn ----

def test_phase_step_equals_the_formula():
    p = PhaseBank(WIDTH)(inputs())
    assert close(phase_step(p), (2 * (1 - angles(p).diff(dim=1).cos())).mean(), 1e-5) and 0 <= phase_step(p) <= 4

def test_phase_step_between_nothing_and_four():
    still, flip = torch.full((2, 6, 3), .7), math.pi * torch.arange(6.)[None, :, None].expand(2, 6, 3)
    assert phase_step(phases_of(still)) == 0 and phase_step(phases_of(flip)) == pytest.approx(4, abs=1e-5)

def test_phase_step_counts_real_pairs_only():
    p, real = PhaseBank(WIDTH)(inputs()), right_padded(13)
    real[0, 5] = False
    step = 2 * (1 - angles(p).diff(dim=1).cos())
    pairs = [(b, t) for b in range(BATCH) for t in range(12) if real[b, t] and real[b, t + 1]]
    assert close(phase_step(p, real), torch.stack([step[b, t] for b, t in pairs]).mean(), 1e-5)
    assert close(phase_step(p, all_real(13)), phase_step(p), 1e-6)

def test_phase_step_of_nothing_is_zero():
    p = PhaseBank(WIDTH)(inputs(1).requires_grad_())
    assert phase_step(p) == 0 and phase_step(p, all_real(1)) == 0
    long = PhaseBank(WIDTH)(inputs(5))
    assert phase_step(long, ~all_real(5)) == 0
    phase_step(p).backward()

# ---- rotation ----

def test_rotation_keeps_norms_and_sees_differences_only():
    q, k, phi = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), 3 * torch.randn(2, 3, 5)
    turn = lambda z, by: rotate(z, by.cos(), by.sin())
    assert close(turn(q, phi).norm(dim=-1), q.norm(dim=-1), 1e-5)
    score = turn(q, phi) @ turn(k, phi).mT
    assert close(turn(q, phi + 2) @ turn(k, phi + 2).mT, score, 1e-4)
    rest = torch.zeros(2, 3, 5)
    assert torch.equal(turn(q, rest), q) and not close(turn(q, rest) @ turn(k, rest).mT, score, .1)

def test_rotation_turns_the_pairs_of_the_source():
    z, phi = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5)
    half = torch.cat([-z[..., 4:], z[..., :4]], -1)
    want = z * phi.cos()[..., None] + half * phi.sin()[..., None]
    assert torch.equal(rotate(z, phi.cos(), phi.sin()), want)
    pairs = torch.complex(z[..., :4], z[..., 4:]) * torch.exp(1j * phi)[..., None]
    assert close(torch.cat([pairs.real, pairs.imag], -1), want)

def test_rotation_keeps_the_dtype_and_names_an_odd_head():
    c, s = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert rotate(torch.randn(1, 1, 4, 6, dtype=dtype), c, s).dtype == dtype
    with pytest.raises(ValueError, match='even width: got 5'): rotate(torch.randn(1, 1, 4, 5), c, s)

# ---- amplitude ----

@pytest.mark.parametrize('own', [False, True], ids=['shared', 'per position'])
def test_amplitude_equals_the_formula(own):
    m, gamma = torch.rand(2, 5, 4) + .1, torch.randn(2, 5, 3, 4) if own else torch.randn(3, 4)
    got = amplitude(m, gamma)
    for b, t, h in np.ndindex(2, 5, 3):
        share = m[b, t] / (m[b, t].mean() + 1e-8)
        a = torch.tanh((F.softplus(gamma[b, t, h] if own else gamma[h]) * share).sum())
        assert close(got[b, t, h], 1 + .5 * a)

def test_amplitude_lies_between_one_and_one_and_a_half():
    m = PhaseBank(WIDTH)(inputs(50)).magnitude
    for gamma in (-3., 0., 1.):
        scale = amplitude(m, torch.full((2, 4), gamma))
        assert (scale > 1).all() and (scale < 1.5).all() and scale.shape == (BATCH, 50, 2)
    assert (amplitude(m, torch.full((2, 4), -200.)) == 1).all()           # off: the factor is exactly one
    start = 1 + .5 * math.tanh(4 * math.log1p(math.exp(-3)))
    assert close(amplitude(m, torch.full((2, 4), -3.)), torch.full((BATCH, 50, 2), start), 1e-4)   # m >= 1e-4

def test_relative_magnitudes_ignore_a_common_factor():
    m = torch.rand(2, 5, 4) + .1
    assert close(relative(m).mean(-1), torch.ones(2, 5)) and close(relative((1 + math.log(2)) * m), relative(m))

# ---- alignment ----

def matrix(p, logits, strength):
    "(B,H,L,L) of cosines of differences, by a loop"
    phi, (B, L, S), H = angles(p), p.cos.shape, len(strength)
    out = torch.zeros(B, H, L, L, dtype=phi.dtype)
    for b, h, i, j in np.ndindex(B, H, L, L):
        w = (logits[b, i, h] if logits.dim() == 4 else logits[h]).softmax(-1) + 1e-8
        out[b, h, i, j] = strength[h] * S ** -.5 * (w * (phi[b, i] - phi[b, j]).cos()).sum()
    return out

@pytest.mark.parametrize('own', [False, True], ids=['shared', 'per query'])
@pytest.mark.parametrize('H,S', [(2, 4), (4, 4), (3, 1)])
def test_alignment_equals_the_formula(H, S, own):
    p = phases_of(3 * torch.randn(2, 4, S, dtype=torch.float64))
    logits, strength = torch.randn((2, 4, H, S) if own else (H, S), dtype=torch.float64), torch.rand(H, dtype=torch.float64)
    q, k = alignment(p.cos, p.sin, logits, strength)
    assert q.shape == k.shape == (2, H, 4, 2 * S) and close(q @ k.mT, matrix(p, logits, strength), 1e-12)

def test_alignment_of_equal_weights_is_symmetric_and_bounded():
    p, strength = PhaseBank(WIDTH)(inputs()), torch.tensor([1., .3])
    q, k = alignment(p.cos, p.sin, torch.zeros(2, 4), strength)
    align = q @ k.mT
    assert close(align, align.mT) and close(align[:, 0].diagonal(dim1=-2, dim2=-1), torch.full((BATCH, 13), .5), 1e-5)
    assert (align.abs() <= strength[:, None, None] / 2 + 1e-6).all()
    q, k = alignment(p.cos, p.sin, 5 * torch.randn(2, 4), strength)
    assert (((q @ k.mT).abs() <= strength[:, None, None] / 2 + 1e-6)).all()

def test_alignment_without_strength_is_nothing():
    p = PhaseBank(WIDTH)(inputs())
    q, k = alignment(p.cos, p.sin, torch.randn(2, 4), torch.zeros(2))
    assert (q @ k.mT == 0).all()

def test_alignment_sees_differences_only():
    phi, logits = torch.randn(2, 6, 4), torch.randn(3, 4)
    a, b = (alignment(phases_of(z).cos, phases_of(z).sin, logits, torch.ones(3)) for z in (phi, phi + 1.3))
    assert close(a[0] @ a[1].mT, b[0] @ b[1].mT, 1e-5)

def test_features_inside_attention_equal_a_bias():
    "Appended to q and k, with the scale of attention undone, under a causal mask"
    q, k, v = torch.randn(3, 2, 2, 6, 8).unbind(0)
    p, logits, strength = PhaseBank(WIDTH)(torch.randn(2, 6, WIDTH)), torch.randn(2, 4), torch.rand(2)
    fq, fk = alignment(p.cos, p.sin, logits, strength)
    bias = (fq @ fk.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    want = F.scaled_dot_product_attention(q, k, v, bias)
    got = F.scaled_dot_product_attention(torch.cat([q, fq * 8 ** .5], -1), torch.cat([k, fk], -1), v, is_causal=True,
                                         scale=8 ** -.5)
    assert close(got, want, 1e-5)

# ---- means over time, the soft gate ----

@pytest.mark.parametrize('real', [all_real(13), right_padded(13), right_padded(13).flip(1), torch.rand(BATCH, 13) < .5],
                         ids=['full', 'right', 'left', 'holes'])
def test_running_mean_equals_a_loop(real):
    x = inputs(); x[~real] = torch.nan                     # what is not real is not read
    got = running_mean(x, real)
    for b, t in np.ndindex(BATCH, 13):
        seen = x[b, :t + 1][real[b, :t + 1]]
        assert close(got[b, t], seen.mean(0) if len(seen) else torch.zeros(WIDTH))

def test_running_mean_keeps_float64_and_widens_bf16():
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert running_mean(inputs(dtype=dtype), all_real(13)).dtype == want

def test_published_gate_equals_the_formula():
    p = PhaseBank(WIDTH).double()(inputs(dtype=torch.float64))
    q = SoftGate(.3, .7, running=False)(p, None)
    half = .3 * p.magnitude.mean((1, 2), keepdim=True)
    g = torch.sigmoid((p.magnitude - half) / (.7 * half + 1e-8))
    assert close(q.cos, g * p.cos) and close(q.sin, g * p.sin) and q.magnitude is p.magnitude
    assert close(q.cos ** 2 + q.sin ** 2, g ** 2) and (g > 0).all() and (g < 1).all()

def test_running_gate_at_the_end_equals_the_published_one():
    p, last = PhaseBank(WIDTH)(inputs()), slice(-1, None)
    a, b = (SoftGate(running=r)(p, all_real(13)) for r in (True, False))
    assert close(a.cos[:, last], b.cos[:, last], 1e-5) and not close(a.cos, b.cos, 1e-3)

def test_running_gate_does_not_read_padding():
    p, real = PhaseBank(WIDTH)(inputs()), right_padded(13)
    a = SoftGate().gate(p.magnitude, real)
    b = SoftGate().gate(p.magnitude.masked_fill(~real[..., None], 1e6), real)
    assert torch.equal(a[real], b[real])

def change_of_the_past(f, L=13, at=9):
    x = inputs(L); y = x.clone(); y[:, at:] = torch.randn(BATCH, L - at, WIDTH)
    return max((a - b)[:, :at].abs().max().item() for a, b in zip(f(x), f(y)))

def test_running_gate_is_causal_and_the_published_one_is_not():
    bank, real = PhaseBank(WIDTH), all_real(13)
    assert change_of_the_past(lambda x: SoftGate()(bank(x), real)[:3]) == 0
    assert change_of_the_past(lambda x: SoftGate(running=False)(bank(x), real)[:3]) > 0

@pytest.mark.parametrize('running', [True, False])
@pytest.mark.parametrize('tau,temperature', [(0., .5), (1e-12, .5), (.5, 0.), (0., 0.)])
def test_gate_at_its_limits(tau, temperature, running):
    m = PhaseBank(WIDTH)(inputs()).magnitude.detach().requires_grad_()
    g = SoftGate(tau, temperature, running).gate(m, right_padded(13))
    if tau < .1: assert (g == 1).all()                     # nothing is below no threshold
    else: assert ((g < 1e-6) | (g > 1 - 1e-6)).all()       # no softness: open or shut
    g.sum().backward()
    assert g.isfinite().all() and m.grad.isfinite().all()

def test_wrong_gates_are_named():
    for kw in (dict(tau=-1.), dict(temperature=-.1), dict(tau=math.nan)):
        with pytest.raises(ValueError, match='at least 0'): SoftGate(**kw)

# ---- modulators ----

def test_user_modulator_equals_the_formula():
    m, x, real = UserModulator(WIDTH, 8, zero=False), inputs(), right_padded(13)
    def by_hand(c): return m.outer(F.gelu(m.inner(c)))
    got = m(x, real)
    assert got.shape == (BATCH, 13, 8)
    assert close(got[0, 4], by_hand(x[0, :5].mean(0))) and close(got[1, 12], by_hand(x[1, :7].mean(0)))
    assert close(got[2], by_hand(torch.zeros(13, WIDTH)))
    m.running = False
    assert close(m(x, real), by_hand(x.mean(1, keepdim=True)).expand(-1, 13, -1))

def test_user_modulator_is_causal_unless_published():
    for running in (True, False):
        m = UserModulator(WIDTH, 8, running=running, zero=False)
        assert (change_of_the_past(lambda x: (m(x, all_real(13)),)) == 0) == running

def test_user_modulator_starts_silent():
    m, x, real = UserModulator(WIDTH, 8), inputs(), all_real(13)
    assert (m(x, real) == 0).all() and (m.inner.weight != 0).any()
    m(x, real).sum().backward()
    assert (m.outer.weight.grad != 0).any()                # silent, but not dead

@pytest.mark.parametrize('n_out,published', [(8, 346_288 - 343_944), (32, (350_224 - 343_944) // 2 - 4)])
def test_user_modulator_parameters(n_out, published):
    "Per-user version: one for the bank. Residual version: one per layer, beside its four burst weights"
    assert sum(p.numel() for p in UserModulator(64, n_out).parameters()) == published

def test_step_modulator_equals_two_convolutions():
    m, x = StepModulator(WIDTH, 4), inputs()
    inner, outer = torch.nn.Conv1d(WIDTH, WIDTH // 2, 1), torch.nn.Conv1d(WIDTH // 2, 8, 1)
    for conv, linear in ((inner, m.inner), (outer, m.outer)):
        conv.weight, conv.bias = torch.nn.Parameter(linear.weight[..., None]), linear.bias
    gain, turn = outer(F.gelu(inner(x.mT))).mT.chunk(2, -1)
    for got, want in zip(m(x), (gain.tanh(), math.pi / 4 * turn.tanh())): assert close(got, want)
    assert sum(p.numel() for p in StepModulator(64, 4).parameters()) == 346_288 - 343_944

def test_step_modulator_is_causal_and_bounded():
    m = StepModulator(WIDTH, 4)
    assert change_of_the_past(m) == 0
    gain, turn = m(1e4 * inputs())
    assert gain.abs().max() <= 1 and turn.abs().max() <= math.pi / 4 + 1e-6

def test_modulation_adds_angles():
    p, dmag, dphi = PhaseBank(WIDTH)(inputs()), torch.randn(BATCH, 13, 4), 2 * torch.randn(BATCH, 13, 4)
    for how, gain in (('tanh', 1 + dmag), ('softplus', 1 + F.softplus(dmag))):
        q = modulate(p, dmag, dphi, how)
        assert close(q.cos, (angles(p) + dphi).cos(), 1e-5) and close(q.sin, (angles(p) + dphi).sin(), 1e-5)
        assert close(q.magnitude, p.magnitude * gain) and q.extra is dmag

def test_no_change_is_the_identity_or_a_factor_that_cancels():
    p, zero = PhaseBank(WIDTH)(inputs()), torch.zeros(BATCH, 13, 4)
    assert all(torch.equal(a, b) for a, b in zip(modulate(p, zero, zero)[:3], p[:3]))
    q, gamma = modulate(p, zero, zero, 'softplus'), torch.randn(2, 4)
    assert torch.equal(q.cos, p.cos) and close(q.magnitude / p.magnitude, torch.full_like(zero, 1.693147))
    assert close(amplitude(q.magnitude, gamma), amplitude(p.magnitude, gamma), 1e-5)

def test_unknown_gain_is_named():
    p, zero = PhaseBank(WIDTH)(inputs()), torch.zeros(BATCH, 13, 4)
    with pytest.raises(ValueError, match="unknown gain 'softmax': did you mean 'softplus'"): modulate(p, zero, zero, 'softmax')

# ---- bursts ----

def burst_by_loop(mhat, real, running):
    out = torch.zeros(mhat.shape[:2])
    for b in range(len(mhat)):
        before = torch.zeros(mhat.shape[2])
        for t in range(mhat.shape[1]):
            if not running: mean = mhat[b].mean(0)
            elif real[b, t]: mean = mhat[b, :t + 1][real[b, :t + 1]].mean(0)
            now = torch.zeros_like(before) if running and not real[b, t] else mhat[b, t] / (mean + 1e-8)
            out[b, t] = (now - before).clamp_min(0).sum()
            before = now
    return out

@pytest.mark.parametrize('running', [True, False])
@pytest.mark.parametrize('real', [all_real(13), right_padded(13), right_padded(13).flip(1)], ids=['full', 'right', 'left'])
def test_burst_equals_a_loop(real, running):
    mhat = relative(PhaseBank(WIDTH)(inputs()).magnitude).detach()
    assert close(burst(mhat, real, running), burst_by_loop(mhat, real, running), 1e-5)

def test_running_burst_is_causal_and_the_published_one_is_not():
    bank = PhaseBank(WIDTH)
    for running in (True, False):
        rises = lambda x: (burst(relative(bank(x).magnitude), all_real(13), running),)
        assert (change_of_the_past(rises) == 0) == running

def test_burst_of_a_constant_is_its_onset():
    rises = burst(torch.ones(BATCH, 6, 4), right_padded(6))
    want = torch.tensor([4., 0, 0, 0, 0, 0])
    assert close(rises, torch.stack([want, want, 0 * want]))

def test_a_planted_burst_is_found():
    m = 1 + .1 * torch.rand(1, 40, 2); m[0, 20:26, 1] = torch.linspace(4, 1.2, 6)
    for running in (True, False):
        assert burst(relative(m), torch.ones(1, 40, dtype=torch.bool), running)[0, 1:].argmax() == 19

# ---- all of it at once ----

def everything(bank, step, user, x, real, running=True):
    "One path through every block; a number"
    p = modulate(bank(x), *step(x))
    dmag, dphi = user(x, real).chunk(2, -1)
    p = SoftGate(running=running)(modulate(p, dmag, dphi, 'softplus'), real)
    q, k = alignment(p.cos, p.sin, torch.zeros(2, 4), torch.ones(2))
    scale, rises = amplitude(p.magnitude, torch.zeros(2, 4)), burst(relative(p.magnitude), real, running)
    z = rotate(x[:, None], p.cos.mean(-1)[:, None], p.sin.mean(-1)[:, None])
    return (q @ k.mT).sum() + scale.sum() + rises.sum() + phase_step(p, real if running else None) + z.sum()

@pytest.mark.parametrize('running', [True, False], ids=['running', 'published'])
@pytest.mark.parametrize('how', ['float32', 'float64', 'bf16 autocast'])
@pytest.mark.parametrize('L', [1, 2, 7, 50])
def test_everything_is_finite_on_every_kind_of_row(L, how, running):
    "Odd and shortest lengths, padding that is zero, rows that are padding only; gradients too"
    dtype, real = torch.float64 if how == 'float64' else torch.float32, right_padded(L)
    parts = [m.to(dtype) for m in (PhaseBank(WIDTH), StepModulator(WIDTH, 4), UserModulator(WIDTH, 8, running=running))]
    x = (inputs(L, dtype) * real[..., None]).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=how.startswith('bf16')):
        total = everything(*parts, x, real, running)
    total.backward()
    assert total.dtype == dtype and total.isfinite() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for m in parts for p in m.parameters())

def test_gradients_equal_differences():
    parts = [m.double() for m in (PhaseBank(4, (3, 5), (1, 2)), StepModulator(4, 2), UserModulator(4, 4, 5, zero=False))]
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    def blocks(x):
        p = modulate(parts[0](x), *parts[1](x))
        p = SoftGate()(modulate(p, *parts[2](x, real).chunk(2, -1), 'softplus'), real)
        return torch.cat([alignment(p.cos, p.sin, torch.eye(2), torch.ones(2))[0].flatten(), phase_step(p, real)[None]])
    assert torch.autograd.gradcheck(blocks, torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True))

# ---- the published bank ----

@needs_data
@pytest.mark.parametrize('name', ['pswrecv13_norot', 'pswrecv13'])
def test_published_weights_fit_the_bank(name, data_dir):
    "The filter bank of a golden file, its weights loaded by name, against the same operations of torch"
    path = data_dir/'golden'/f'{name}.npz'
    if not path.exists(): pytest.skip(f'no {path.name}')
    with np.load(path) as z: weights = {k: torch.tensor(z[k]) for k in z.files if 'phase_filter' in k}
    ours = {f'{part}.{s}': weights[f'param::phase_filter.{part}_convs.{s}.weight'][:, 0]
            for part in ('real', 'imag') for s in range(4)}
    bank = PhaseBank(16)
    bank.load_state_dict(ours)
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in bank.parameters())
    x = torch.randn(4, 8, 16)
    for a, b in zip(bank.parts(x), depthwise(bank, x)): assert close(a, b)
