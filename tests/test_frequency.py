"Filters over time and the models made of them: against torch.fft, against plain maths, and at their edges."
import copy
import pytest, torch
import torch.nn.functional as F
from types import SimpleNamespace
from seqrec_nb.blocks.frequency import (DynamicFilter, FourierFilter, FrequencyRescaler, HaarEnhancer, WaveletFilter,
                                        waves)
from seqrec_nb.core import Batch, reseed
from seqrec_nb.data.loader import Loader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.losses import CrossEntropy
from seqrec_nb.models.base import check_model, create, settings
from seqrec_nb.models.frequency import BSARec, FMLPRec, WEARec
from seqrec_nb.models.window import AttentionRec
from seqrec_nb.train import Trainer

LENGTHS = [1, 2, 3, 8, 9, 50]
MODELS = [FMLPRec, BSARec, WEARec]
BOTH = pytest.mark.parametrize('as_published', [False, True], ids=['corrected', 'published'])
EACH = pytest.mark.parametrize('make', MODELS)

def places(real, last=False):
    L = real.shape[1]
    return SimpleNamespace(real=real, last=torch.full((len(real),), L - 1) if last else None)

def window(B, L, D=8, dtype=torch.float64, seed=0):
    "Vectors, and which cells are real: rows of every length, the first of padding alone"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, D, generator=g, dtype=dtype), torch.arange(L) >= L - (torch.arange(B) * 2)[:, None]

def stir(mixer, seed=0):
    "Random parameters in place of the initial ones, and double precision"
    g = torch.Generator().manual_seed(seed); mixer = mixer.double()
    for p in mixer.parameters(): p.data = 1.4 * torch.rand(p.shape, generator=g, dtype=p.dtype) - .7
    return mixer

# ---- plain forms ----

def fourier(m, x, real):
    X = torch.fft.rfft(x, dim=1, norm='ortho') * torch.view_as_complex(m.weight)
    return torch.fft.irfft(X, n=x.shape[1], dim=1, norm='ortho')

def split(x, c):
    X = torch.fft.rfft(x, dim=1, norm='ortho')
    low = torch.fft.irfft(X * (torch.arange(X.shape[1]) < c // 2 + 1)[:, None], n=x.shape[1], dim=1, norm='ortho')
    return low, x - low

def rescaler(c):
    def f(m, x, real):
        low, high = split(x, c)
        return low + m.beta ** 2 * high
    return f

def dynamic(m, x, real):
    (B, L, D), H = x.shape, m.n_heads
    X = torch.fft.rfft(x.view(B, L, H, -1).transpose(1, 2), dim=2, norm='ortho')
    rows = [x[r] if m.all_columns else x[r, real[r]] for r in range(B)]
    mean = torch.stack([row.sum(0) / max(len(row), 1) for row in rows])
    a = m.mlp(mean).view(B, H, L // 2 + 1, 2)
    bias = torch.complex(m.base_bias + a[..., 1:], torch.zeros_like(a[..., 1:]))
    y = torch.fft.irfft(X * (m.base_filter * (1 + a[..., :1])) + bias, n=L, dim=2, norm='ortho')
    return y.transpose(1, 2).reshape(B, L, D)

def haar(first=0):
    def f(m, x, real):
        T, y = m.detail[0].transpose(0, 1).reshape(-1, x.shape[2]), [torch.zeros_like(x[:, 0])] * x.shape[1]
        start = first * (x.shape[1] % 2)
        for i in range(x.shape[1] // 2):
            a, b = x[:, start + 2 * i], x[:, start + 2 * i + 1]
            mean, detail = (a + b) / 2, T[i] * (a - b) / 2
            y[start + 2 * i], y[start + 2 * i + 1] = mean + detail, mean - detail
        return torch.stack(y, 1)
    return f

def blend(alpha, first):
    return lambda m, x, real: (1 - alpha) * haar(first)(m.haar, x, real) + alpha * dynamic(m.fourier, x, real)

CASES = {
    'fourier': (lambda L: FourierFilter(8, L), fourier),
    'rescaler c=1': (lambda L: FrequencyRescaler(8, L, 1), rescaler(1)),
    'rescaler c=3': (lambda L: FrequencyRescaler(8, L, 3), rescaler(3)),
    'rescaler c=L': (lambda L: FrequencyRescaler(8, L, L), lambda m, x, real: x),
    'dynamic H=1': (lambda L: DynamicFilter(8, 1, L), dynamic),
    'dynamic H=4': (lambda L: DynamicFilter(8, 4, L), dynamic),
    'dynamic, all columns': (lambda L: DynamicFilter(8, 2, L, all_columns=True), dynamic),
    'haar': (lambda L: HaarEnhancer(8, 2, L), haar()),
    'haar, newest': (lambda L: HaarEnhancer(8, 2, L, newest=True), haar(1)),
    'wavelet': (lambda L: WaveletFilter(8, 2, L, .3, all_columns=True), blend(.3, 0)),
    'wavelet, newest': (lambda L: WaveletFilter(8, 2, L, .3, newest=True), blend(.3, 1))}
CASE = pytest.mark.parametrize('case', CASES)

@pytest.mark.parametrize('L', range(1, 13))
def test_waves_are_an_orthonormal_basis(L):
    Q = waves(L).flatten(0, 1)
    assert Q.shape == (2 * (L // 2 + 1), L) and torch.allclose(Q.T @ Q, torch.eye(L).double(), atol=1e-13)
    assert (Q.norm(dim=1) > .5).sum() == L      # the others are exactly 0
    assert not Q[Q.norm(dim=1) < .5].any()

@CASE
@pytest.mark.parametrize('L', LENGTHS)
def test_mixers_equal_the_plain_form_in_values_and_gradients(case, L):
    make, plain = CASES[case]
    m, (x, real) = stir(make(L)), window(5, L)
    for last in (False, True):
        results = []
        for f in (lambda x: m(x, places(real, last)), lambda x: plain(m, x, real)[:, -1:] if last else plain(m, x, real)):
            z = x.clone().requires_grad_(); m.zero_grad(); y = f(z)
            ((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + 0 * z.sum()).backward()    # y may be a constant 0
            results.append([y, z.grad] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()])
        for a, b in zip(*results): assert torch.allclose(a, b, atol=1e-12, rtol=1e-12), (case, L, last)

@CASE
@pytest.mark.parametrize('L', LENGTHS)
def test_single_precision_and_bf16_autocast(case, L):
    make, plain = CASES[case]
    m, (x, real) = stir(make(L)), window(5, L); want = plain(m, x, real)
    m, x, scale = m.float(), x.float().requires_grad_(), want.abs().max().clamp_min(x.abs().max())
    for last in (False, True):
        w = want[:, -1:] if last else want
        assert (m(x, places(real, last)) - w).abs().max() < 1e-6 * scale
        with torch.autocast('cpu', torch.bfloat16): y = m(x, places(real, last))
        assert y.shape == w.shape and (y - w).abs().max() < .03 * scale
        (y.float().sum() + 0 * x.sum()).backward()
        assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())

def test_float_to_double_keeps_the_waves_exact():
    "The table is made in double precision, whatever the model was made in"
    m = FrequencyRescaler(4, 50, 3)
    assert m.waves.dtype == torch.float64 and 'waves' not in m.state_dict()
    x, real = window(2, 50, 4); m = m.double()
    assert (m(x, places(real)) - rescaler(3)(m, x, real)).abs().max() < 1e-13
    assert copy.deepcopy(m).state_dict().keys() == {'beta'}

# ---- identities ----

@pytest.mark.parametrize('L', LENGTHS)
def test_unit_filter_is_the_identity_and_phases_keep_energy(L):
    m, (x, real) = stir(FourierFilter(8, L)), window(3, L)
    m.weight.data = torch.tensor([1., 0]).double().expand(m.weight.shape).clone()
    assert torch.allclose(m(x, places(real)), x, atol=1e-12)
    angle = torch.randn(m.weight.shape[:-1]).double(); angle[:, 0] = 0
    if L % 2 == 0: angle[:, -1] = 0
    m.weight.data = torch.stack([angle.cos(), angle.sin()], -1)
    assert torch.allclose(m(x, places(real)).square().sum(1), x.square().sum(1), atol=1e-10)

@pytest.mark.parametrize('L', [8, 9])
def test_imaginary_parts_without_a_sine_are_dropped(L):
    m, (x, real) = stir(FourierFilter(8, L)), window(3, L); y = m(x, places(real))
    edges = [0, L // 2] if L % 2 == 0 else [0]
    m.weight.data[:, edges, :, 1] += 5
    assert y.dtype == torch.float64 and torch.equal(m(x, places(real)), y)
    m(x, places(real)).square().sum().backward()
    assert not m.weight.grad[:, edges, :, 1].any() and m.weight.grad[:, 1:L // 2, :, 1].all()

@pytest.mark.parametrize('L', LENGTHS)
def test_low_and_high_make_the_whole(L):
    x, real = window(3, L)
    def scaled(c, beta):
        m = FrequencyRescaler(8, L, c).double(); m.beta.data.fill_(beta); return m(x, places(real)), m
    for c in (1, 3, 5):
        low, high = split(x, c)
        assert torch.allclose(scaled(c, 0.)[0], low, atol=1e-12)
        assert torch.allclose(scaled(c, 2.)[0] - low, 4 * high, atol=1e-12)
        for beta in (1., -1.): assert torch.allclose(scaled(c, beta)[0], x, atol=1e-12)
    for c in (L, L + 3):
        y, m = scaled(c, 3.)
        assert torch.allclose(y, x, atol=1e-12)
        y.square().sum().backward(); assert m.beta.grad.abs().max() < 1e-11

@pytest.mark.parametrize('L', LENGTHS)
def test_dynamic_filter_at_rest(L):
    "No change, gain 1, bias 0: the identity; the initial bias moves the oldest column alone"
    m, (x, real) = DynamicFilter(8, 2, L).double(), window(4, L)
    for p in m.mlp[2].parameters(): p.data.zero_()
    moved = m(x, places(real)) - x; click = torch.zeros_like(moved); click[:, 0] = -.1 * L ** .5
    assert torch.allclose(moved, click, atol=1e-8)     # -.1 has been single precision
    m.base_bias.data.zero_(); assert torch.allclose(m(x, places(real)), x, atol=1e-12)

@pytest.mark.parametrize('L', LENGTHS)
def test_haar_keeps_averages_or_swaps_pairs(L):
    x, real = window(3, L); n = L - L % 2; pairs = x[:, :n].unflatten(1, (-1, 2)); m = HaarEnhancer(8, 2, L).double()
    for T, want in ((1., pairs), (0., pairs.mean(2, keepdim=True).expand_as(pairs)), (-1., pairs.flip(2))):
        m.detail.data.fill_(T); y = m(x, places(real))
        assert torch.allclose(y[:, :n], want.flatten(1, 2), atol=1e-12) and not y[:, n:].any()

def test_odd_windows_drop_the_newest_column_as_published_and_the_oldest_here():
    x, real = window(3, 9)
    for newest, silent in ((False, 8), (True, 0)):
        m = stir(HaarEnhancer(8, 2, 9, newest)); y = m(x, places(real)); z = x.clone(); z[:, silent] += 1
        assert torch.equal(m(z, places(real)), y) and not y[:, silent].any()
        assert bool(m(x, places(real, last=True)).any()) is newest

@pytest.mark.parametrize('L', [8, 9])
def test_alpha_isolates_the_branches(L):
    x, real = window(3, L)
    for alpha, branch in ((1., 'fourier'), (0., 'haar')):
        m = stir(WaveletFilter(8, 2, L, alpha))
        assert torch.equal(m(x, places(real)), getattr(m, branch)(x, places(real)))
        m(x, places(real)).square().sum().backward()
        other = m.haar if branch == 'fourier' else m.fourier
        assert not any(p.grad.any() for p in other.parameters())

def test_filters_of_frequencies_turn_in_a_circle_and_the_wavelet_does_not():
    x, real = window(3, 8); real[:] = True
    for m, turns in ((FourierFilter(8, 8), True), (FrequencyRescaler(8, 8, 3), True), (HaarEnhancer(8, 2, 8), False)):
        m = stir(m); a, b = m(x.roll(3, 1), places(real)), m(x, places(real)).roll(3, 1)
        assert torch.allclose(a, b, atol=1e-12) is turns

def test_the_mean_vector_leaves_padding_out_unless_asked():
    x, real = window(4, 8); x = x * real[..., None]
    y = x + (~real)[..., None] * torch.randn(8).double()
    here, published = DynamicFilter(8, 2, 8).double(), DynamicFilter(8, 2, 8, all_columns=True).double()
    assert torch.equal(here.context(x, real), here.context(y, real)) and not here.context(x, real)[0].any()
    assert torch.allclose(here.context(x, real)[2], x[2, real[2]].mean(0))
    assert not torch.allclose(published.context(x, real), published.context(y, real))
    assert torch.allclose(published.context(x, real)[2], x[2].mean(0))

def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match='multiple of n_heads'): DynamicFilter(8, 3, 10)
    with pytest.raises(ValueError, match='multiple of n_heads'): WEARec(10, d_model=8, n_heads=3)
    with pytest.raises(ValueError, match='multiple of n_heads'): BSARec(10, d_model=8, n_heads=3)

# ---- models ----

@pytest.mark.parametrize('make, n_items, kw, published, corrected', [
    (FMLPRec, 3646, {}, 310_080, 310_080), (BSARec, 3646, {}, 337_088, 337_088), (BSARec, 12101, {}, 878_208, 878_208),
    (WEARec, 3646, {}, 328_674, 328_672), (WEARec, 12101, dict(n_heads=8), 910_978, 910_976),
    (WEARec, 3416, {}, 313_954, 313_952), (WEARec, 18357, dict(n_heads=4), 1_283_906, 1_283_904),
    (WEARec, 3646, dict(max_len=200), 387_474, 387_472)], ids=str)
def test_parameter_counts(make, n_items, kw, published, corrected):
    count = lambda **more: sum(p.numel() for p in make(n_items, **kw, **more).parameters())
    assert count(as_published=True) == published and count() == corrected

VARIANTS = [(n, kw) for n in ('fmlprec', 'bsarec', 'wearec') for kw in
            ({}, dict(max_len=12), dict(max_len=9), dict(max_len=2), dict(n_blocks=1), dict(input_norms=2), dict(d_inner=8))] + \
           [('bsarec', kw) for kw in (dict(alpha=.5, n_heads=2), dict(c=9), dict(max_len=1))] + [('fmlprec', dict(max_len=1))] + \
           [('wearec', kw) for kw in (dict(alpha=.9), dict(n_heads=1), dict(n_heads=8))]

@pytest.mark.parametrize('name, kw', VARIANTS, ids=str)
def test_every_variant_passes_every_check(name, kw): check_model(name, d_model=16, **kw)

def test_defaults_are_those_of_the_sources():
    for name, own in (('fmlprec', {}), ('bsarec', dict(n_heads=1, alpha=.9, c=3, attn_dropout=.5)), ('wearec', dict(n_heads=2, alpha=.3))):
        assert dict(d_model=64, n_blocks=2, max_len=50, dropout=.5, as_published=False, input_norms=1, **own).items() <= settings(type(create(name, 5, d_model=8))).items()

def rows(L, lengths, n_items=30, seed=1):
    g = torch.Generator().manual_seed(seed); n = torch.tensor(lengths)
    items = torch.randint(1, n_items + 1, (len(n), max(max(lengths), 1)), generator=g)
    return Batch(items * (torch.arange(items.shape[1]) < n[:, None]), length=n)

@EACH
@BOTH
@pytest.mark.parametrize('L', [1, 2, 7, 8])
def test_finite_at_every_edge(make, as_published, L):
    "Rows of padding alone, one item, windows of one or an odd number of columns; three precisions; gradients too"
    b = rows(L, [0, 1, L // 2, L]); b.target = torch.tensor([1, 2, 3, 4])
    for dtype, autocast in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        reseed(0, 'edge'); m = make(30, d_model=16, max_len=L, as_published=as_published, init_std=.3).to(dtype).train()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            out = m(b); loss = F.cross_entropy(m.score(b.at_last(out.h), out.E).float(), b.target)
        loss.backward()
        assert out.h.isfinite().all() and loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
        whole = m.eval()(Batch(b.items)).h
        assert whole.isfinite().all() and whole.dtype == dtype

@EACH
@BOTH
@torch.no_grad()
def test_the_last_column_alone_equals_the_last_of_all(make, as_published):
    for L in (7, 8):
        reseed(0, 'last'); m = make(30, d_model=16, max_len=L, as_published=as_published, init_std=.3).eval().double()
        b = rows(L, [0, 1, 2, 5, L]); whole = b.at_last(m(b).h)
        b.target = torch.ones(5, dtype=torch.long)
        assert torch.allclose(b.at_last(m(b).h), whole, atol=1e-12)

@EACH
@torch.no_grad()
def test_padding_is_never_read_unless_as_published(make):
    b = rows(12, [1, 3, 6, 11])
    for as_published in (False, True):
        reseed(0, 'padding'); m = make(30, d_model=16, max_len=12, as_published=as_published, init_std=.3).eval()
        E = m.table().clone(); E[0] = 7.
        same = torch.allclose(m(b, E).h[3, :11], m(b).h[3, :11], atol=1e-6) and torch.equal(m.scores(b)[:, 1:], m.scores(b, E)[:, 1:])
        assert same is not as_published
        wide = Batch(F.pad(b.items, (0, 1)), length=b.length)
        assert torch.allclose(m.scores(wide), m.scores(b), atol=1e-5)

@EACH
@BOTH
@torch.no_grad()
def test_the_future_is_seen(make, as_published):
    reseed(0, 'future'); m = make(30, d_model=16, max_len=20, as_published=as_published, init_std=.3).eval()
    assert not m.causal
    b = rows(20, [20] * 4); other = b.items.clone(); other[:, 12] = other[:, 12] % 30 + 1
    assert (m(b).h - m(Batch(other)).h)[:, :12].abs().max() > 1e-3

@EACH
def test_all_positions_are_refused_and_prefixes_are_not(make):
    data = synthetic(n_users=60, n_items=60, longest=55, graph=(0., 0., 0.))
    reseed(0, 'refuse'); m = make(data.n_items, d_model=16, max_len=10)
    with pytest.raises(ValueError, match=f'{make.__name__} is not causal.*prefix'):
        Trainer(m, Loader(data.train, 10, 64, samples='all'), CrossEntropy())
    with pytest.raises(ValueError, match='MASK'):
        Trainer(m, Loader(data.train, 10, 64, samples='cloze'), CrossEntropy())
    t = Trainer(m, Loader(data.train, 10, 256, samples='prefix'), CrossEntropy(), lr=1e-2)
    first = t.fit(1).record['loss']; assert t.fit(3).record['loss'] < first

@BOTH
@torch.no_grad()
def test_bsarec_without_its_filter_is_sasrec(as_published):
    kw = dict(d_model=16, n_heads=2, max_len=9, as_published=as_published, init_std=.3)
    reseed(0, 'alpha'); bsa, sas = BSARec(30, alpha=0., **kw).eval(), AttentionRec(30, **kw).eval()
    state = {k.replace('.mix.attention.', '.mix.'): v for k, v in bsa.state_dict().items() if '.mix.filter.' not in k}
    sas.load_state_dict(state)
    b = rows(9, [1, 4, 9]); b.target = torch.tensor([1, 2, 3])
    assert torch.allclose(b.at_last(bsa(b).h), b.at_last(sas(b).h), atol=1e-6)

@pytest.mark.parametrize('alpha, silent', [(0., '.filter.'), (1., '.attention.')])
def test_bsarec_alpha_silences_a_branch(alpha, silent):
    m, b = BSARec(30, d_model=16, max_len=9, alpha=alpha), rows(9, [1, 4, 9])
    m(b).h.square().sum().backward()
    grads = {n: p.grad for n, p in m.named_parameters()}
    assert all(g is None or not g.any() for n, g in grads.items() if silent in n)
    loud = '.attention.' if silent == '.filter.' else '.filter.'
    assert all(g.any() for n, g in grads.items() if loud in n and 'qkv.bias' not in n)

def test_wearec_holds_the_unused_parameter_only_as_published():
    unused = lambda m: [n for n, _ in m.named_parameters() if 'gate_param' in n]
    assert not unused(WEARec(30, d_model=16))
    m, b = WEARec(30, d_model=16, max_len=9, as_published=True), rows(9, [1, 4, 9])
    assert len(unused(m)) == 2
    m(b).h.square().sum().backward()
    assert [n for n, p in m.named_parameters() if p.grad is None] == unused(m)

@torch.no_grad()
def test_wearec_in_an_odd_window_hears_its_newest_item_in_the_wavelet():
    "With alpha = 0 and no residual the published branch is deaf to the last item"
    for as_published in (False, True):
        m = WEARec(30, d_model=16, max_len=9, alpha=0., as_published=as_published).eval()
        mixer, (x, real) = m.blocks[0].mix.mixer, window(2, 9, 16, torch.float32); y = x.clone(); y[:, -1] += 1
        heard = not torch.equal(mixer(x, places(real))[:, -1], mixer(y, places(real))[:, -1])
        assert heard is not as_published

@EACH
def test_dropout_draws_from_the_step_seed_alone(make):
    "Two passes after the same reseed are equal, whatever torch's own generator did"
    m, b = make(30, d_model=16, max_len=9).train(), rows(9, [1, 4, 9]); h = []
    for k in range(2):
        reseed(5, 'step'); h.append(m(b).h)
    assert torch.equal(*h)

@EACH
def test_predicting_before_training_breaks_nothing(make):
    "What is made under inference_mode must not reach autograd"
    m, b = make(30, d_model=16, max_len=9), rows(9, [1, 4, 9])
    m.predict(b, 3); m(b).h.square().sum().backward()
    assert m.item.weight.grad.any()
