"Fusion: α(L) of every type, its start, bounds, gradients and penalty; and that the original's defects are seen."
import copy, threading
import numpy as np, pytest, torch
from torch import nn
from seqrec_nb.blocks.fusion import (FUSIONS, DiscreteFusion, PiecewiseFusion, bounded, increasing, interpolate,
                                     make_fusion, raw_steps, unbounded)
from seqrec_nb.core import reseed

LENGTHS = [0, 1, 5, 10, 11, 15, 30, 50, 51, 60, 10**4, 10**6]
CONSTANT = 'fixed', 'discrete'
REPAIRED = 'learnable', 'continuous', 'piecewise'
ORIGINAL = 'learnable_original', 'continuous_original'
KNOTS = torch.tensor([5, 15, 30, 60])

def moved(name, size=3., **kw):
    "A fusion whose parameters are far from their start"
    fusion = make_fusion(name, **kw)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in fusion.parameters(): p.add_(torch.randn(p.shape, generator=g) * size)
    return fusion

def gradient(fusion, lengths):
    "Of each parameter, for the sum of α at these lengths"
    fusion.zero_grad()
    fusion(torch.tensor(lengths)).sum().backward()
    return {name: p.grad for name, p in fusion.named_parameters()}

# ---- every type ----

def test_every_type_has_a_name():
    assert set(FUSIONS) == {*CONSTANT, *REPAIRED, *ORIGINAL}
    assert all(isinstance(make_fusion(name), kind) for name, kind in FUSIONS.items())

@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
@pytest.mark.parametrize('shape', [(12,), (12, 1), (3, 4), (2, 3, 2), (0,)])
@pytest.mark.parametrize('name', FUSIONS)
def test_shape_type_device_and_range(name, shape, dtype):
    length = torch.tensor(LENGTHS[:int(np.prod(shape))], dtype=dtype).view(shape)
    alpha = moved(name)(length)
    assert alpha.shape == length.shape and alpha.dtype == torch.float32 and alpha.device == length.device
    assert alpha.isfinite().all() and (0 <= alpha).all() and (alpha <= 1).all()

@pytest.mark.parametrize('name', FUSIONS)
def test_a_scalar_length(name):
    fusion = make_fusion(name)
    alpha = fusion(torch.tensor(7))
    assert alpha.shape == () and torch.isclose(alpha, fusion(torch.tensor([7]))[0])

@pytest.mark.parametrize('name', sorted(set(FUSIONS) - {'continuous_original'}))   # autocast knows no meta device
def test_device_is_that_of_the_lengths(name):
    "Without a GPU: the meta device knows shapes, types and devices"
    alpha = make_fusion(name).to('meta')(torch.empty(2, 5, dtype=torch.int64, device='meta'))
    assert (alpha.device.type, alpha.shape, alpha.dtype) == ('meta', (2, 5), torch.float32)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', FUSIONS)
def test_same_on_a_gpu(name):
    fusion, length = moved(name), torch.tensor(LENGTHS).view(3, 4)
    there = copy.deepcopy(fusion).cuda()
    assert torch.allclose(there(length.cuda()).cpu(), fusion(length), atol=1e-6)
    assert torch.allclose(there.penalty().cpu(), fusion.penalty(), atol=1e-6)

@pytest.mark.parametrize('name', FUSIONS)
def test_autocast_changes_nothing(name):
    fusion, length = moved(name), torch.tensor(LENGTHS)
    with torch.autocast('cpu', torch.bfloat16): alpha, penalty = fusion(length), fusion.penalty()
    assert alpha.dtype == penalty.dtype == torch.float32
    assert torch.equal(alpha, fusion(length)) and torch.equal(penalty, fusion.penalty())

def test_bfloat16_would_be_seen():
    "Negative twin: the same network without the guard rounds α"
    mlp, x = make_fusion('continuous_original').mlp, torch.tensor([[1.], [2.]])
    with torch.autocast('cpu', torch.bfloat16): assert mlp(x).dtype == torch.bfloat16

@pytest.mark.parametrize('name', FUSIONS)
def test_alpha_depends_on_the_own_length_only(name):
    "α at training position t is that of a history which ends there: full[t] == prefix[-1], in any batch and order"
    fusion, full = moved(name, size=.5), torch.arange(1, 121)
    alpha = fusion(full)
    def same(a, b): return torch.allclose(a, b, rtol=0, atol=1e-6)   # vector instructions round the odd ends otherwise
    for t in (1, 5, 10, 11, 50, 51, 60, 120): assert same(fusion(full[:t])[-1], alpha[t - 1])
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert same(fusion(full[order].view(8, 15)), alpha[order].view(8, 15))

def test_one_alpha_per_user_would_be_seen():
    "Negative twin: the user's full length at every position is not the prefix's"
    fusion, position = make_fusion('discrete'), torch.arange(1, 61)
    per_user = fusion(torch.full_like(position, 60))
    assert not torch.equal(per_user[:10], fusion(position[:10]))

@pytest.mark.parametrize('name', FUSIONS)
def test_threads_share_a_fusion(name):
    "No state: eight threads with lengths of their own get what they would get alone"
    fusion, wrong = moved(name), []
    def work(seed):
        length = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(seed))
        alone = copy.deepcopy(fusion)(length)
        wrong.extend(seed for _ in range(20) if not torch.equal(fusion(length), alone))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert wrong == []

@pytest.mark.parametrize('name', FUSIONS)
def test_one_graph_without_breaks(name):
    fusion, length = make_fusion(name), torch.tensor(LENGTHS).view(3, 4)
    assert torch.equal(torch.compile(fusion, fullgraph=True, backend='eager')(length), fusion(length))

@pytest.mark.parametrize('name', FUSIONS)
def test_weights_travel_and_the_start_stays(name):
    "The state holds parameters only; a fusion made with the same arguments knows the same start"
    fusion, other = moved(name), make_fusion(name)
    other.load_state_dict(fusion.state_dict())
    assert set(fusion.state_dict()) == {n for n, _ in fusion.named_parameters()}
    length = torch.tensor(LENGTHS)
    assert torch.equal(other(length), fusion(length)) and torch.equal(other.penalty(), fusion.penalty())

@pytest.mark.parametrize('name', sorted(set(FUSIONS) - {'continuous_original'}))
def test_start_needs_no_luck(name):
    reseed(1); one = make_fusion(name)(torch.tensor(LENGTHS))
    state = torch.get_rng_state(); other = make_fusion(name)(torch.tensor(LENGTHS))
    assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())

# ---- constants ----

@pytest.mark.parametrize('alpha', [0, .3, .5, 1])
def test_fixed_is_exact(alpha):
    fusion = make_fusion('fixed', fixed_alpha=alpha)
    assert torch.equal(fusion(torch.tensor(LENGTHS)), torch.full((12,), alpha, dtype=torch.float32))
    assert not list(fusion.parameters()) and not fusion.learned and fusion.penalty() == 0

def test_discrete_is_exact():
    fusion = make_fusion('discrete')
    alpha = fusion(torch.tensor([0, 1, 10, 11, 50, 51, 10**6]))
    assert torch.equal(alpha, torch.tensor([.3, .3, .3, .5, .5, .7, .7]))
    assert not list(fusion.parameters()) and not fusion.learned and fusion.penalty() == 0

@pytest.mark.parametrize('name', ['discrete', 'learnable', 'learnable_original'])
def test_borders_of_the_groups(name):
    s, m, l = make_fusion(name)(torch.tensor([1, 30, 100])).detach()
    assert torch.equal(make_fusion(name)(torch.tensor([10, 11, 50, 51])), torch.stack([s, m, m, l]))
    other = make_fusion(name, L_short=5, L_long=30)(torch.tensor([0, 5, 6, 30, 31]))
    assert torch.equal(other, torch.stack([s, s, m, m, l]))

@pytest.mark.parametrize('values, rises', [((.3, .5, .7), True), ((.4, .4, .9), True), ((.7, .5, .3), False)])
def test_discrete_rises_as_its_values_do(values, rises):
    assert bool((DiscreteFusion(init=values)(torch.arange(100)).diff() >= 0).all()) == rises

# ---- bounds and starts ----

@pytest.mark.parametrize('bounds', [(.1, .9), (.2, .8), (0., 1.)])
@pytest.mark.parametrize('size', [0., 1., 100., 1e6])
@pytest.mark.parametrize('name', REPAIRED)
def test_bounds_hold_wherever_training_goes(name, size, bounds):
    for monotone in (False, True):
        fusion = moved(name, size, alpha_min=bounds[0], alpha_max=bounds[1], monotone=monotone)
        alpha = fusion(torch.tensor(LENGTHS))
        low, high = torch.tensor(bounds)
        assert alpha.isfinite().all() and (low <= alpha).all() and (alpha <= high + 1e-7).all()

def test_originals_know_no_bounds():
    "Negative twin"
    alpha = moved('learnable_original', 100.)(torch.tensor(LENGTHS))
    assert (alpha < .1).any() or (alpha > .9).any()

STARTS = {'learnable': ([1, 10, 30, 51], [.3, .3, .5, .7]), 'continuous': ([1, 200], [.3, .7]),
          'piecewise': ([0, 5, 15, 30, 60, 10**6], [.3, .3, .4, .5, .6, .6])}

@pytest.mark.parametrize('monotone', [False, True])
@pytest.mark.parametrize('name', REPAIRED)
def test_start_is_as_asked(name, monotone):
    at, alpha = STARTS[name]
    fusion = make_fusion(name, monotone=monotone)
    assert torch.allclose(fusion(torch.tensor(at)), torch.tensor(alpha), rtol=0, atol=1e-6)
    assert (fusion(torch.arange(1, 201)).diff() >= -1e-6).all()
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in fusion.parameters())

@pytest.mark.parametrize('name, init, at', [('learnable', (.2, .45, .85), [3, 20, 99]), ('continuous', (.25, .8), [1, 200]),
                                            ('piecewise', (.11, .12, .5, .89), KNOTS.tolist()), ('discrete', (0, .5, 1), [3, 20, 99])])
def test_another_start(name, init, at):
    assert torch.allclose(make_fusion(name, init=init)(torch.tensor(at)), torch.tensor(init).float(), atol=1e-6)

def test_start_of_the_originals():
    "Negative twin: .3/.5/.7 before the sigmoid are .574/.622/.668 after it"
    alpha = make_fusion('learnable_original')(torch.tensor([1, 30, 100]))
    assert torch.allclose(alpha, torch.tensor([.5744, .6225, .6682]), atol=5e-5)

def test_start_of_the_original_curve_is_luck():
    "Negative twin: 97 parameters whose curve falls for some seeds and rises for others"
    def lean(seed):
        reseed(seed); fusion = make_fusion('continuous_original')
        assert sum(p.numel() for p in fusion.parameters()) == 97
        return fusion(torch.tensor([1, 200])).diff().item()
    leans = [lean(seed) for seed in range(40)]
    assert min(leans) < -.05 and max(leans) > .05

def test_listed_curve_falls():
    "Negative twin: the improvement list's start runs from .823 down to .790, though its comment says it rises"
    alpha = torch.sigmoid(-.1 * torch.arange(1., 201).log1p() + 1.5) * .4 + .5
    assert (alpha.diff() < 0).all() and abs(alpha[0] - .823) < 5e-4 and abs(alpha[-1] - .790) < 5e-4

# ---- gradients ----

def test_bounds_are_alive():
    "The gradient near a bound is (α-a)(b-α)/(b-a), not 0"
    alpha = torch.tensor([.1001, .3, .5, .7, .8999], dtype=torch.float64)
    z = unbounded(alpha, .1, .9).requires_grad_()
    bounded(z, .1, .9).sum().backward()
    assert torch.allclose(z.grad, (alpha - .1) * (.9 - alpha) / .8) and (z.grad > 0).all()
    assert torch.autograd.gradcheck(lambda z: bounded(z, .1, .9), (z,))

def test_clamp_is_dead_outside():
    "Negative twin"
    theta = torch.tensor([.05, .5, .95], requires_grad=True)
    theta.clamp(.1, .9).sum().backward()
    assert theta.grad.tolist() == [0, 1, 0]

@pytest.mark.parametrize('name', REPAIRED)
def test_a_fusion_at_its_bound_comes_back(name):
    init = {'learnable': (.899,) * 3, 'continuous': (.899, .899), 'piecewise': (.899,) * 4}[name]
    fusion, length = make_fusion(name, init=init), torch.arange(1, 100)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=.1)
    for _ in range(200):
        optimizer.zero_grad(); (fusion(length) - .5).square().mean().backward(); optimizer.step()
    assert (fusion(length) - .5).abs().max() < .05

@pytest.mark.parametrize('name, key', [('learnable', 'alpha.theta'), ('learnable_original', 'theta')])
@pytest.mark.parametrize('lengths, touched', [([1, 7, 10], [1, 0, 0]), ([11, 50], [0, 1, 0]), ([51, 9999], [0, 0, 1]),
                                              ([3, 70], [1, 0, 1])])
def test_only_groups_of_the_batch_learn(name, key, lengths, touched):
    assert (gradient(make_fusion(name), lengths)[key] != 0).long().tolist() == touched

@pytest.mark.parametrize('length, weights', [(0, [1, 0, 0, 0]), (5, [1, 0, 0, 0]), (10, [.5, .5, 0, 0]), (18, [0, .8, .2, 0]),
                                             (30, [0, 0, 1, 0]), (45, [0, 0, .5, .5]), (60, [0, 0, 0, 1]), (10**6, [0, 0, 0, 1])])
def test_two_neighbours_learn(length, weights):
    values = torch.rand(4, requires_grad=True)
    interpolate(torch.tensor(length), KNOTS, values).backward()
    assert torch.allclose(values.grad, torch.tensor(weights).float(), atol=1e-7)
    assert (values.grad == 0).tolist() == [w == 0 for w in weights]     # exactly 0 elsewhere
    theta = gradient(make_fusion('piecewise'), [length])['alpha.theta']
    start = torch.tensor([.3, .4, .5, .6])
    assert torch.allclose(theta, torch.tensor(weights) * (start - .1) * (.9 - start) / .8, atol=1e-6)

# ---- never falling ----

def test_increasing_and_its_inverse():
    z = torch.tensor([-3., -2.9, 0., 8.], dtype=torch.float64)
    assert torch.allclose(increasing(raw_steps(z)), z)
    assert (increasing(torch.randn(100, 4).double()[0] * 50).diff() >= 0).all()

@pytest.mark.parametrize('size', [.5, 3., 50.])
@pytest.mark.parametrize('name', REPAIRED)
def test_monotone_cannot_fall(name, size):
    length = torch.arange(0, 2000)
    assert (moved(name, size, monotone=True)(length).diff() >= -1e-6).all()     # rounding

@pytest.mark.parametrize('name', REPAIRED)
def test_free_can_fall(name):
    "Negative twin: training that wants a falling curve gets one, unless monotone forbids it"
    length, wanted = torch.arange(1, 100), torch.linspace(.8, .2, 99)
    def fitted(monotone):
        fusion = make_fusion(name, monotone=monotone)
        optimizer = torch.optim.Adam(fusion.parameters(), lr=.1)
        for _ in range(100):
            optimizer.zero_grad(); (fusion(length) - wanted).square().mean().backward(); optimizer.step()
        return fusion(length).detach()
    free, kept = fitted(False), fitted(True)
    assert free[0] > free[-1] + .2 and kept[0] <= kept[-1]

# ---- continuous ----

def test_continuous_is_smooth():
    for fusion in (make_fusion('continuous'), make_fusion('continuous', monotone=True), moved('continuous', .3)):
        assert fusion(torch.arange(0, 1000)).diff().abs().max() < .08
        assert fusion(torch.tensor([0, 10**6])).isfinite().all()

def test_groups_are_not_smooth():
    "Negative twin"
    assert make_fusion('learnable')(torch.arange(0, 100)).diff().abs().max() > .15

def test_continuous_is_its_formula():
    fusion = moved('continuous', .5)
    w, b = fusion.w.item(), fusion.b.item()
    for L in LENGTHS:
        by_hand = .1 + .8 / (1 + np.exp(-(w * np.log(L + 1) + b)))
        assert abs(fusion(torch.tensor(L)).item() - by_hand) < 1e-6

# ---- piecewise ----

def naive(length, at, values):
    "The loop over the batch that the requirement shows, with any knots"
    def one(L):
        if L <= at[0]: return values[0]
        for (x, y), (u, v) in zip(zip(at, at[1:]), zip(values, values[1:])):
            if L <= y: return u + (v - u) * (L - x) / (y - x)
        return values[-1]
    return [one(L) for L in length]

@pytest.mark.parametrize('seed', range(4))
def test_interpolation_against_loop_and_numpy(seed):
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(200, 5, replace=False)); values = rng.random(5).astype('float32')
    length = np.concatenate([np.arange(0, 260), [10**6]])
    ours = interpolate(torch.tensor(length), torch.tensor(at), torch.tensor(values)).numpy()
    assert np.allclose(ours, np.interp(length, at, values), atol=1e-6)
    assert np.allclose(ours, naive(length, at, values), atol=1e-6)

def test_piecewise_is_interpolation_of_its_values():
    fusion, length = moved('piecewise', 1.), np.arange(0, 200)
    values = fusion.alpha().detach()
    assert np.allclose(fusion(torch.tensor(length)).detach(), np.interp(length, KNOTS, values), atol=1e-6)
    assert torch.equal(fusion(KNOTS), values)                                           # the knots themselves
    assert torch.equal(fusion(torch.tensor([0, 4, 61, 10**6])), values[[0, 0, 3, 3]])   # constant outside

def test_piecewise_is_continuous_at_knots():
    fusion = moved('piecewise', 1.)
    values, eps = fusion.alpha().detach(), 1e-3
    near = interpolate(torch.stack([KNOTS - eps, KNOTS + eps]), KNOTS, values)
    assert (near - values).abs().max() < 2 * eps

# ---- penalty ----

@pytest.mark.parametrize('name', FUSIONS)
def test_penalty_is_zero_at_the_start(name):
    penalty = make_fusion(name).penalty()
    assert penalty.shape == () and penalty.dtype == torch.float32 and penalty == 0

@pytest.mark.parametrize('name, at', [('learnable', [10, 50, 51]), ('continuous', [1, 10, 50, 200]), ('piecewise', [5, 15, 30, 60])])
def test_penalty_is_the_squared_distance(name, at):
    at, fusion = torch.tensor(at), moved(name, 1.)
    by_hand = ((fusion(at) - make_fusion(name)(at)) ** 2).sum()
    assert torch.allclose(fusion.penalty(), by_hand) and by_hand > 0

@pytest.mark.parametrize('name', REPAIRED)
def test_penalty_pulls_to_the_start(name):
    fusion, at = moved(name, .7), make_fusion(name).at
    optimizer = torch.optim.Adam(fusion.parameters(), lr=.05)
    for _ in range(400):
        optimizer.zero_grad(); (.01 * fusion.penalty()).backward(); optimizer.step()
    assert (fusion(at) - make_fusion(name)(at)).abs().max() < .01

def test_square_of_alpha_pulls_to_the_graph():
    "Negative twin: the requirement's .01 Σθ² has its minimum at α = 0"
    theta = nn.Parameter(torch.tensor([.4, .5, .6]))
    optimizer = torch.optim.Adam([theta], lr=.05)
    for _ in range(400):
        optimizer.zero_grad(); (.01 * theta.square().sum()).backward(); optimizer.step()
    assert theta.abs().max() < .01

@pytest.mark.parametrize('name', [*CONSTANT, *ORIGINAL])
def test_no_penalty_without_knots(name):
    assert moved(name).penalty() == 0

# ---- fusing ----

@pytest.mark.parametrize('name', FUSIONS)
def test_look_up_then_fuse(name):
    "The same as the original's table per user, which holds B·V·D numbers"
    g = torch.Generator().manual_seed(0)
    E, G = torch.randn(2, 40, 6, generator=g)
    items, alpha = torch.randint(40, (5, 7), generator=g), moved(name)(torch.tensor([1, 9, 20, 60, 300]))[:, None, None]
    table = alpha * E + (1 - alpha) * G
    picked = alpha * E[items] + (1 - alpha) * G[items]
    assert torch.allclose(table[torch.arange(5)[:, None], items], picked, rtol=0, atol=1e-6)

def test_alpha_one_is_no_graph():
    E, G = torch.randn(2, 40, 6)
    alpha = make_fusion('fixed', fixed_alpha=1)(torch.arange(40))[:, None]
    assert torch.equal(alpha * E + (1 - alpha) * G, E)

# ---- what cannot be ----

@pytest.mark.parametrize('kw, words', [
    (dict(fusion_type='learnabel'), "did you mean 'learnable'"), (dict(fusion_type='fixed', fixed_alpha=1.1), 'fixed_alpha'),
    (dict(fusion_type='fixed', fixed_alpha=float('nan')), 'fixed_alpha'),
    (dict(fusion_type='learnable', alpha_min=.9, alpha_max=.1), 'alpha_min < alpha_max'),
    (dict(fusion_type='piecewise', alpha_min=.5, alpha_max=.5), 'alpha_min < alpha_max'),
    (dict(fusion_type='continuous', alpha_max=1.5), 'alpha_min < alpha_max'),
    (dict(fusion_type='learnable', alpha_min=.4), 'not inside'), (dict(fusion_type='learnable', init=(.1, .5, .7)), 'not inside'),
    (dict(fusion_type='piecewise', init=(.3, .5)), '4 numbers'), (dict(fusion_type='discrete', init=(.3, .5, 2)), r'\[0, 1\]'),
    (dict(fusion_type='learnable', L_short=50, L_long=10), 'L_short < L_long'), (dict(fusion_type='discrete', L_short=-1), 'L_short'),
    (dict(fusion_type='learnable', monotone=True, init=(.5, .4, .6)), 'increasing'),
    (dict(fusion_type='continuous', monotone=True, init=(.5, .5)), 'increasing'),
    (dict(fusion_type='fixed', init=(.5,)), 'no init'), (dict(fusion_type='learnable_original', monotone=True), 'no monotone')])
def test_errors_say_what_is_wrong(kw, words):
    with pytest.raises(ValueError, match=words): make_fusion(**kw)

def test_settings_of_other_types_are_left_aside():
    settings = dict(fixed_alpha=.4, L_short=5, L_long=30, alpha_min=.2, alpha_max=.8)
    for name in FUSIONS: make_fusion(name, **settings)
    assert isinstance(make_fusion('piecewise', init=[.3, .4, .5, .6]), PiecewiseFusion)     # a list, as from JSON
