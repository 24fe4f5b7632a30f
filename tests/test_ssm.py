"The selective scan, the Mamba block and PSWMamba: every backend equals the plain loop, the past is blind to the future."
import math
import pytest, torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from seqrec_nb.blocks import ssm
from seqrec_nb.blocks.modulation import modulate
from seqrec_nb.blocks.phase import Phases
from seqrec_nb.blocks.ssm import BACKENDS, MambaBlock, selective_scan
from seqrec_nb.core import Batch, reseed
from seqrec_nb.models.base import check_model
from seqrec_nb.models.pswmamba import PhaseMamba, PSWMamba, pswrec_vmamba, speed
from seqrec_nb.models.window import Places

LENGTHS = [1, 2, 3, 15, 16, 17, 50, 200]
FAST = [name for name in BACKENDS if name != 'ref']

@pytest.fixture(autouse=True)
def seeded(): reseed(0, 'test ssm')

def inputs(L=17, B=5, E=6, N=4, dtype=torch.float64):
    "Everything that a scan can be given"
    r = lambda *shape: torch.randn(*shape, dtype=dtype)
    return dict(u=r(B, L, E), dt=r(B, L, E), A=-torch.rand(E, N, dtype=dtype) * N, B=r(B, L, N), C=r(B, L, N),
                D=r(E), z=r(B, L, E), dt_bias=r(E), h0=r(B, E, N))

def results(given, backend, seed=0):
    "Output, last state, and the gradients of a random sum of both"
    given = {k: v.clone().requires_grad_() for k, v in given.items()}
    y, h = selective_scan(**given, softplus=True, return_state=True, backend=backend)
    g = torch.Generator().manual_seed(seed)
    weigh = lambda t: (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum()
    grads = torch.autograd.grad(weigh(y) + weigh(h), list(given.values()))
    return dict(y=y.detach(), h=h.detach(), **dict(zip(given, grads)))

def apart(a, b): return float((a.detach().double() - b.detach().double()).abs().max())

def moved(a, b): return (a != b).flatten(2).any(-1)

# ---- the scan ----

@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('L', LENGTHS)
def test_backend_equals_the_loop(backend, L):
    "Output, state, and gradients for u, dt, A, B, C, D, z, the bias of dt and the first state"
    given = inputs(L)
    plain, fast = results(given, 'ref'), results(given, backend)
    for name, value in plain.items():
        assert apart(fast[name], value) <= 1e-10 * max(1., float(value.abs().max())), name

@pytest.mark.parametrize('rows,steps', [(1, 1), (1, 16), (2, 4), (3, 5), (5, 50)])
def test_blocks_of_any_size_give_the_same(rows, steps, monkeypatch):
    "Rows and steps that do not divide B and L leave smaller pieces at the end"
    monkeypatch.setattr(ssm, 'work_sizes', lambda x, N: (min(steps, x.shape[1]), rows))
    given = inputs(L=19)
    for (name, a), b in zip(results(given, 'seq').items(), results(given, 'ref').values()): assert apart(a, b) < 1e-11, name

def test_blocks_fit_the_cache():
    for B, L, E, N in ((256, 50, 128, 64), (3, 7, 16, 4), (64, 1, 128, 64), (2, 2000, 2048, 256)):
        steps, rows = ssm.work_sizes(torch.empty(B, L, E, device='meta').to('meta'), N)
        assert (steps, rows) == (min(16, L), B)                  # not a CPU: all rows at once
        steps, rows = ssm.work_sizes(torch.empty(B, L, 1).expand(B, L, E), N)
        assert 1 <= steps <= L and 1 <= rows <= B
        assert rows == 1 or rows * steps * E * N * 4 <= ssm.CACHE

@pytest.mark.parametrize('backend', list(BACKENDS))
def test_gradcheck(backend):
    given = inputs(L=5, B=2, E=3, N=2)
    names, values = list(given), [v.requires_grad_() for v in given.values()]
    def f(*values): return selective_scan(**dict(zip(names, values)), softplus=True, return_state=True, backend=backend)
    assert torch.autograd.gradcheck(f, values)

@pytest.mark.parametrize('backend', list(BACKENDS))
def test_float32_is_close_to_float64(backend):
    given = inputs(L=50, E=16, N=16)
    exact, single = results(given, 'ref'), results({k: v.float() for k, v in given.items()}, backend)
    for name, value in exact.items():
        assert single[name].dtype == torch.float32
        if name in 'yh': assert apart(single[name], value) <= 1e-5 * max(1., float(value.abs().max())), name
        else: assert float((single[name] - value).norm() / value.norm()) <= 1e-5, name

def test_a_decay_of_known_size():
    "A constant u and dt: h_t is a geometric series, and B is dt B (Euler), not the exact integral"
    L, dt, a = 6, .3, -.7
    one = torch.ones(1, L, 1, dtype=torch.float64)
    y = selective_scan(one * 2, one * dt, torch.full((1, 1), a, dtype=torch.float64), one * 5, one * 3)
    q = math.exp(dt * a)
    want = torch.tensor([3 * 5 * 2 * dt * sum(q ** i for i in range(t + 1)) for t in range(L)], dtype=torch.float64)
    assert apart(y[0, :, 0], want) < 1e-12

@pytest.mark.parametrize('backend', list(BACKENDS))
@pytest.mark.parametrize('name', ['u', 'dt', 'B', 'C', 'z'])
def test_nothing_moves_the_past(backend, name):
    given = inputs(L=40, dtype=torch.float32)
    other = dict(given, **{name: given[name].clone()})
    other[name][:, 21] += 1
    y, w = (selective_scan(**g, softplus=True, backend=backend) for g in (given, other))
    assert torch.equal(y[:, :21], w[:, :21]) and not torch.equal(y[:, 21], w[:, 21])

@pytest.mark.parametrize('backend', list(BACKENDS))
def test_no_gradient_comes_from_the_future(backend):
    given = {k: v.float().requires_grad_() for k, v in inputs(L=40).items()}
    y = selective_scan(**given, softplus=True, backend=backend)
    for i in (0, 15, 16, 30):
        for g in torch.autograd.grad(y[:, i].sum(), [given[k] for k in ('u', 'dt', 'B')], retain_graph=True):
            assert not g[:, i + 1:].any() and g[:, :i + 1].any()

@pytest.mark.parametrize('backend', list(BACKENDS))
@pytest.mark.parametrize('cut', [1, 7, 16, 29])
def test_a_history_read_in_two_pieces(backend, cut):
    given = inputs(L=30)
    y, h = selective_scan(**given, softplus=True, return_state=True, backend=backend)
    piece = lambda s, h0: {**{k: v[:, s] if k in ('u', 'dt', 'B', 'C', 'z') else v for k, v in given.items()}, 'h0': h0}
    first, state = selective_scan(**piece(slice(cut), given['h0']), softplus=True, return_state=True, backend=backend)
    second, end = selective_scan(**piece(slice(cut, None), state), softplus=True, return_state=True, backend=backend)
    assert apart(torch.cat([first, second], 1), y) < 1e-12 and apart(end, h) < 1e-12

@pytest.mark.parametrize('backend', list(BACKENDS))
@pytest.mark.parametrize('dt', [0., 1e-30, 1e-3, 1., 1e3, 1e15])
@pytest.mark.parametrize('rate', [1e-30, 1., 1e30])
def test_extreme_steps_stay_finite(backend, dt, rate):
    "And no memory is larger than the sum of what was written"
    given = {k: v.float() for k, v in inputs(L=20).items() if k in ('u', 'B', 'C')}
    given |= dict(dt=torch.full_like(given['u'], dt), A=torch.full((6, 4), -rate))
    given = {k: v.requires_grad_() for k, v in given.items()}
    y, h = selective_scan(**given, return_state=True, backend=backend)
    grads = torch.autograd.grad(y.sum() + h.sum(), list(given.values()))
    assert all(t.isfinite().all() for t in (y, h, *grads))
    written = (given['dt'] * given['u']).abs().transpose(1, 2) @ given['B'].abs()
    assert (h.abs() <= written * (1 + 1e-5)).all()

def test_a_step_of_zero_writes_nothing_and_forgets_nothing():
    given = inputs(L=9); given['dt'][:, 4] = 0
    del given['dt_bias']
    given['dt'] = given['dt'].abs()
    _, h = selective_scan(**given, return_state=True)
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    short = {k: v[:, keep] if v.dim() == 3 and v.shape[1] == 9 else v for k, v in given.items()}
    assert apart(selective_scan(**short, return_state=True)[1], h) < 1e-13

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scanned_in_float32(half):
    given = {k: v.to(half) for k, v in inputs(L=60).items()}
    y, h = selective_scan(**given, softplus=True, return_state=True)
    want = selective_scan(**{k: v.float() for k, v in given.items()}, softplus=True)
    assert (y.dtype, h.dtype) == (half, torch.float32) and torch.equal(y, want.to(half))

def test_autocast_changes_nothing_inside():
    "Neither forward nor backward, whether that is called inside or outside"
    given = {k: v.float() for k, v in inputs(L=20).items()}
    plain = results(given, 'seq')
    with torch.autocast('cpu', torch.bfloat16): inside = results(given, 'seq')
    for name, value in plain.items(): assert torch.equal(inside[name], value), name

def test_odd_layouts_are_the_same():
    "Transposed, expanded, sliced inputs"
    given = {k: v for k, v in inputs(L=8).items()}
    odd = dict(given, u=given['u'].transpose(0, 1).contiguous().transpose(0, 1), A=given['A'].T.contiguous().T,
               B=torch.cat([given['B'], given['B']], -1)[..., :4], h0=given['h0'][:1].expand(5, -1, -1))
    plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in odd.items()}
    for (name, a), b in zip(results(odd, 'seq').items(), results(plain, 'seq').values()): assert apart(a, b) == 0, name

def test_no_rows_and_no_device():
    given = {k: v[:0] if v.dim() == 3 else v for k, v in inputs(L=3).items()}
    assert selective_scan(**given).shape == (0, 3, 6)
    assert selective_scan(**{k: v.to('meta') for k, v in inputs(L=20).items()}, softplus=True).shape == (5, 20, 6)
    y = MambaBlock(8).to('meta')(torch.empty(2, 20, 8, device='meta'))
    y.sum().backward()

def kept(backend, B=4, L=64, E=32, N=64):
    "Elements of every tensor that is kept for the backward pass"
    found = {}
    def note(t): found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes() // t.element_size(); return t
    given = {k: v.float().requires_grad_() for k, v in inputs(L, B, E, N).items()}
    with saved_tensors_hooks(note, lambda t: t): out = selective_scan(**given, softplus=True, backend=backend)
    return found.values(), B * L * E * N, out

def test_memory_does_not_hold_every_state():
    found, whole, _ = kept('seq')
    assert max(found) <= whole // ssm.CHUNK and sum(found) < .4 * whole
    assert sum(kept('ref')[0]) > 2 * whole                   # the loop keeps decays, products and states

def test_without_gradients_nothing_is_kept():
    with torch.no_grad(): assert not kept('seq')[0]

def test_names_and_shapes_of_errors():
    given = inputs()
    with pytest.raises(ValueError, match="unknown backend 'sec': did you mean 'seq'"): selective_scan(**given, backend='sec')
    with pytest.raises(ValueError, match=r'C must be \(5, 17, 4\): got \(5, 17, 3\)'): selective_scan(**dict(given, C=given['C'][..., :3]))
    with pytest.raises(ValueError, match=r'h0 must be \(5, 6, 4\)'): selective_scan(**dict(given, h0=given['h0'].mT))
    u = given['u'].requires_grad_()
    g, = torch.autograd.grad(selective_scan(**given).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

def test_a_backend_can_be_added(monkeypatch):
    monkeypatch.setitem(BACKENDS, 'mine', lambda u, dt, A, B, C, h=None: (u * 0 + 7, None))
    given = inputs(); del given['z'], given['D']
    assert (selective_scan(**given, backend='mine') == 7).all()

# ---- the block ----

def block_inputs(L=12, B=3, D=8): return torch.randn(B, L, D)

def test_names_are_those_of_mamba_ssm():
    shapes = {k: tuple(v.shape) for k, v in MambaBlock(64, 32).state_dict().items()}
    assert shapes == {'A_log': (128, 32), 'D': (128,), 'in_proj.weight': (256, 64), 'conv1d.weight': (128, 1, 4),
                      'conv1d.bias': (128,), 'x_proj.weight': (68, 128), 'dt_proj.weight': (128, 4),
                      'dt_proj.bias': (128,), 'out_proj.weight': (64, 128)}
    assert sum(p.numel() for p in MambaBlock(64, 32).parameters()) == 38_784
    assert MambaBlock(40, dt_rank=7).dt_proj.in_features == 7 and MambaBlock(40).dt_proj.in_features == 3

@pytest.mark.parametrize('L', [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize('d_conv', [1, 2, 4])
def test_block_equals_plain_maths(L, d_conv):
    "torch's own convolution, then the equations one element at a time"
    m, x = MambaBlock(8, 3, d_conv).double(), block_inputs(L).double()
    u, z = (x @ m.in_proj.weight.T).chunk(2, -1)
    u = F.silu(m.conv1d(u.mT)[..., :L].mT)
    dt, B, C = (u @ m.x_proj.weight.T).split([1, 3, 3], -1)
    dt, A, h, ys = F.softplus(m.dt_proj(dt)), -m.A_log.exp(), torch.zeros(3, 16, 3, dtype=torch.float64), []
    for t in range(L):
        for n in range(3):
            h = h.clone()
            h[..., n] = (dt[:, t] * A[:, n]).exp() * h[..., n] + dt[:, t] * B[:, t, n:n + 1] * u[:, t]
        ys.append(sum(h[..., n] * C[:, t, n:n + 1] for n in range(3)) + m.D * u[:, t])
    assert apart(m(x), (torch.stack(ys, 1) * F.silu(z)) @ m.out_proj.weight.T) < 1e-12

def test_start_of_the_step_sizes():
    "Log-uniform in [.001, .1]; A = -(1..N); the weights are U(-R^-.5, R^-.5)"
    m = MambaBlock(1024, 16)
    dt = F.softplus(m.dt_proj.bias.detach())
    assert 1e-3 <= dt.min() * (1 + 1e-5) and dt.max() <= .1 * (1 + 1e-5)
    share = dt.log().sub(math.log(1e-3)).div(math.log(100)).sort().values      # uniform in [0, 1]
    assert apart(share, torch.linspace(0, 1, len(share))) < .05
    w = m.dt_proj.weight.detach()
    assert w.abs().max() <= 64 ** -.5 and w.std() == pytest.approx(64 ** -.5 / 3 ** .5, rel=.05)
    assert apart(m.A_log.exp(), torch.arange(1., 17).expand(2048, 16)) < 1e-5 and (m.D == 1).all()

def test_block_sees_no_future():
    m, x = MambaBlock(8).eval(), block_inputs(20)
    y = x.clone(); y[:, 11] += 1
    assert moved(m(x), m(y)).tolist() == [[False] * 11 + [True] * 9] * 3

@pytest.mark.parametrize('left,right', [(0, 5), (5, 0), (1, 2), (30, 17)])
@pytest.mark.parametrize('fill', [0., 7., 1e4])
def test_padding_is_never_read(left, right, fill):
    "Whatever stands in it, however much there is"
    m, x = MambaBlock(8).eval(), block_inputs()
    real = F.pad(torch.ones(3, 12, dtype=torch.bool), (left, right))
    wide = F.pad(x, (0, 0, left, right), value=fill)
    shift, scale = torch.randn(3, real.shape[1], 16), 1 + torch.rand(3, real.shape[1], 1)
    at = slice(left, left + 12)
    y = m(wide, real, scale, shift)[:, at]
    assert apart(y, m(x, None, scale[:, at], shift[:, at])) < 1e-6
    if left: assert apart(m(wide)[:, at], m(x)) > 1e-5       # without `real`, even zeros count: the convolution has a bias

def test_one_wanted_column():
    m, x, last = MambaBlock(8), block_inputs(), torch.tensor([11, 0, 5])
    more = torch.arange(12) <= last[:, None], 1 + torch.rand(3, 12, 1), torch.randn(3, 12, 16)
    whole, one = m(x, *more), m(x, *more, last)
    assert one.shape == (3, 1, 8) and apart(one[:, 0], whole[torch.arange(3), last]) < 1e-6
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters()))
             for y in (whole[torch.arange(3), last], one)]
    for a, b in zip(*grads): assert apart(a, b) < 1e-5

@pytest.mark.parametrize('L', [1, 2, 7])
def test_rows_of_padding_and_short_rows_are_finite(L):
    m, x = MambaBlock(8), block_inputs(L)
    real = torch.arange(L) < torch.tensor([[0], [1], [L]])
    y = m(x, real); y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())

def test_bfloat16_autocast_is_close():
    m, x = MambaBlock(16, 8), torch.randn(4, 50, 16)
    with torch.autocast('cpu', torch.bfloat16): y = m(x)
    y.float().sum().backward()
    assert y.isfinite().all() and float((y - m(x)).detach().norm() / m(x).detach().norm()) < .02
    assert all(p.grad.isfinite().all() for p in m.parameters())

# ---- the model ----

def small(**kw): return PSWMamba(**{**dict(n_items=40, d_model=16, d_state=8, max_len=12, dropout=0.), **kw}).eval()

def history(L=12, B=4, n_items=40):
    items = torch.randint(1, n_items + 1, (B, L))
    return Batch(items * (torch.arange(L) < torch.tensor([L, 1, L // 2 + 1, 0])[:, None]))

@pytest.mark.parametrize('name,kw', [('pswmamba', {}), ('pswrec_vmamba', {}), ('pswmamba', dict(input_norms=2)),
                                     ('pswmamba', dict(n_blocks=1, max_len=9, d_conv=2, expand=1, n_bands=2))])
def test_model_passes_every_check(name, kw): check_model(name, **{**dict(d_model=16, d_state=8, max_len=12), **kw})

def test_number_of_parameters():
    "As published for LastFM, in both modes and under both names"
    for make in (PSWMamba, pswrec_vmamba):
        for published in (False, True):
            assert sum(p.numel() for p in make(3646, as_published=published).parameters()) == 349_676

def test_dt_survives_the_start_unless_as_published():
    for block in PSWMamba(40).blocks:
        dt = F.softplus(block.dt_proj.bias)
        assert .9e-3 < dt.min() and dt.max() < .11 and block.dt_proj.weight.abs().max() <= .5
    for block in PSWMamba(40, as_published=True).blocks:
        assert not block.dt_proj.bias.any() and block.dt_proj.weight.detach().std() == pytest.approx(.02, rel=.2)
    for published in (False, True):
        m = PSWMamba(4000, as_published=published)
        assert m.input_norms == 1 + published and bool(m.item.weight[0].any()) == published
        assert m.change.inner.weight.abs().max() > .1           # Conv1d in the source: its start is never overwritten

def test_step_factor_has_its_bounds():
    "1 + softplus of a mean of tanh: it can only speed forgetting up"
    low, high = (1 + F.softplus(torch.tensor(v)) for v in (-1., 1.))
    assert (float(low), float(high)) == (pytest.approx(1.3133, abs=1e-4), pytest.approx(2.3133, abs=1e-4))
    m, x = small(), torch.randn(3, 12, 16)
    with torch.no_grad():
        for bias, want in ((-1e3, low), (0., 1 + math.log(2)), (1e3, high)):
            m.change.outer.weight.zero_(); m.change.outer.bias.fill_(bias)
            factor = speed(modulate(m.bank(x), *m.change(x)))
            assert factor.shape == (3, 12, 1) and apart(factor, torch.as_tensor(want).expand(3, 12, 1)) < 1e-6

def test_silent_phases_leave_a_mamba_block_with_longer_steps():
    m = PhaseMamba(16, 4, 8, 4, 2)
    plain, x, real = MambaBlock(16, 8), torch.randn(3, 12, 16), torch.ones(3, 12, dtype=torch.bool)
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k in plain.state_dict()})
    turns = torch.randn(3, 12, 4)
    phases = Phases(turns.cos(), turns.sin(), torch.ones(3, 12, 4), torch.zeros(3, 12, 4))
    with torch.no_grad(): m.phase_proj.weight.zero_()
    want = F.layer_norm(plain(x, dt_scale=torch.full((3, 12, 1), 1 + math.log(2))) + x, (16,), eps=1e-12)
    assert apart(m(x, Places(real), phases), want) < 1e-5
    with torch.no_grad(): m.phase_proj.weight.normal_()
    assert apart(m(x, Places(real), phases), want) > 1e-3

def test_only_the_corrected_mode_ignores_padding():
    "Noise in the padding row of the table, and windows of other widths"
    for published in (False, True):
        m, b = small(as_published=published), history()
        with torch.no_grad():
            h = m(b).h[:3]; m.item.weight[0] = torch.randn(16)
            change = apart(m(b).h[:3], h)
        assert (change == 0) == (not published)
    m, b = small(), history()
    narrow = Batch(b.items[2:3, :7])
    assert apart(m(narrow).h, m(b).h[2:3, :7]) < 1e-5

def test_aligned_windows_give_the_same_when_padding_is_masked():
    "The corrected layers do not care on which side the padding stands"
    m, b = small(), history()
    right = m(b).h
    m.aligned = True
    left = m(b).h
    for r, n in enumerate(b.mask.sum(1).tolist()): assert n == 0 or apart(left[r, n - 1], right[r, n - 1]) < 1e-5

@pytest.mark.parametrize('L', [1, 2, 12])
@pytest.mark.parametrize('published', [False, True])
def test_training_is_finite_everywhere(L, published):
    "Empty rows, short windows, float32, float64 and bfloat16"
    for dtype, auto in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        m, b = small(as_published=published, dropout=.5).to(dtype).train(), history(L)
        for target in (torch.tensor([1, 2, 3, 4]), None):
            with torch.autocast('cpu', torch.bfloat16, enabled=auto):
                h = m(Batch(b.items, target)).h
            h.float().square().sum().backward()
            assert h.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)

def test_last_column_alone_is_the_same():
    for published in (False, True):
        m, b = small(as_published=published), history()
        assert apart(b.at_last(m(Batch(b.items, torch.ones(4).long())).h)[:3], b.at_last(m(b).h)[:3]) < 1e-5

def test_bands_are_checked():
    with pytest.raises(ValueError, match='5 bands need as many kernels'): PSWMamba(40, n_bands=5)
    assert len(PSWMamba(40, n_bands=2).bank.real) == 2 and len(PSWMamba(40, n_bands=2, as_published=True).bank.real) == 4
