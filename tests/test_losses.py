"Losses against their formulas in double precision, negatives against what they promise."
import math
import pytest, torch
import torch.nn.functional as F
from seqrec_nb.core import Batch, Out, drawing, reseed, rng
from seqrec_nb.losses import BCE, BPR, GBCE, LOSSES, TINY, CrossEntropy, Negatives, SampledSoftmax, make_loss
from seqrec_nb.models.base import SeqModel
from seqrec_nb.models.sasrec import SASRec

class Plain(SeqModel):
    "A model whose score is the dot product"
class Own(SeqModel):
    "A model with a score of its own, here again the dot product"
    def score(self, h, E, b=None, items=None): return SeqModel.score(self, h, E, b, items)

def case(V=37, B=5, L=7, D=6, one=False, seed=0, scale=1.):
    "Vectors, table and a batch with rows of all lengths"
    g = torch.Generator().manual_seed(seed)
    n = torch.arange(B) % L + 1; real = torch.arange(L) < n[:, None]
    items, target = (torch.randint(1, V, (B, L), generator=g) * real for _ in range(2))
    h, E = (scale * torch.randn(*s, D, generator=g) for s in ((B, L), (V,)))
    b = Batch(items, target.gather(1, n[:, None] - 1)[:, 0] if one else target, torch.arange(B), n)
    b.n_targets = int((b.target > 0).sum())
    return h.requires_grad_(), E.requires_grad_(), b

def naive(h, E, b, cap=math.inf):
    "Full cross-entropy in double precision, position by position"
    h, E = h.double(), E.double()
    every = [(h[r, b.length[r] - 1], t) for r, t in enumerate(b.target)] if b.target.dim() == 1 else [
        (h[r, j], b.target[r, j]) for r in range(len(b)) for j in range(b.items.shape[1]) if b.target[r, j] > 0]
    return sum((-(E[1:] @ x).log_softmax(0)[t - 1]).clamp_max(cap) for x, t in every) / len(every)

class Live(Plain):
    "A model whose padding row is a class, as in published code"
    first_id = 0
class LiveOwn(Own): first_id = 0

def naive_live(h, E, b):
    "The same over all rows of the table, padding among them"
    h, E = h.double(), E.double()
    every = [(h[r, j], b.target[r, j]) for r in range(len(b)) for j in range(b.items.shape[1]) if b.target[r, j] > 0]
    return sum(-(E @ x).log_softmax(0)[t] for x, t in every) / len(every)

def value_and_gradients(f, h, E):
    loss = f(); return loss.detach(), *torch.autograd.grad(3 * loss, (h, E))

@pytest.mark.parametrize('one', [False, True], ids=['all', 'one'])
@pytest.mark.parametrize('chunk', [1, 3, 20, 21, 512])
@pytest.mark.parametrize('scale', [.1, 1., 4.])
def test_chunked_cross_entropy(one, chunk, scale):
    h, E, b = case(one=one, scale=scale)
    mine = value_and_gradients(lambda: CrossEntropy(chunk)(Plain(36, 6), Out(h, E), b), h, E)
    want = value_and_gradients(lambda: naive(h, E, b), h, E)
    want = naive(h, E, b, -math.log(TINY)), *want[1:]             # the value is cut, the gradient is not
    for x, y in zip(mine, want): assert torch.allclose(x.double(), y.double(), rtol=2e-5, atol=1e-5)
    assert not mine[2][0].any() and (scale > 1 or mine[2][1:].any(1).all()) # padding gets nothing

def test_gradcheck_by_differences():
    "The gradient that was made by hand is the slope of the value"
    h, E, b = case(V=9, B=3, L=3, D=2)
    loss = lambda: CrossEntropy(2)(Plain(8, 2), Out(h, E), b)
    for x, g in zip((h, E), torch.autograd.grad(loss(), (h, E))):
        for at in [(0, 0, 1), (2, 2, 0)] if x is h else [(3, 1), (8, 0)]:
            with torch.no_grad(): x[at] += 1e-2; up = loss(); x[at] -= 2e-2; down = loss(); x[at] += 1e-2
            assert abs((up - down) / 2e-2 - g[at]) < 2e-3

def test_without_gradients():
    h, E, b = case()
    with torch.no_grad(): assert torch.allclose(CrossEntropy()(Plain(36, 6), Out(h, E), b).double(), naive(h, E, b))

def test_only_the_table_learns():
    h, E, b = case(); h = h.detach()
    g, = torch.autograd.grad(CrossEntropy(4)(Plain(36, 6), Out(h, E), b), E)
    assert torch.allclose(g.double(), torch.autograd.grad(naive(h, E, b), E)[0].double(), atol=1e-6)

def test_bf16_is_close():
    h, E, b = case(scale=.7)
    with torch.autocast('cpu', torch.bfloat16): mine = value_and_gradients(lambda: CrossEntropy(4)(Plain(36, 6), Out(h.bfloat16(), E), b), h, E)
    want = value_and_gradients(lambda: naive(h, E, b), h, E)
    assert abs(mine[0] - want[0]) < .02 * want[0]
    for x, y in zip(mine[1:], want[1:]): assert (x - y).norm() < .03 * y.norm()
    exact = value_and_gradients(lambda: CrossEntropy(4)(Plain(36, 6), Out(h, E), b), h, E)
    assert not torch.equal(exact[1], mine[1])                     # it was bf16

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_broken_vector_is_never_a_loss(value):
    h, E, b = case()
    with torch.no_grad(): h[2, 1] = value
    assert not CrossEntropy(4)(Plain(36, 6), Out(h, E), b).isfinite()

def test_a_hopeless_target_is_finite():
    h, E, b = case(scale=40.)
    mine = value_and_gradients(lambda: CrossEntropy()(Plain(36, 6), Out(h, E), b), h, E)
    assert all(x.isfinite().all() for x in mine)

@pytest.mark.parametrize('one', [False, True], ids=['all', 'one'])
def test_a_score_of_its_own_takes_the_general_path(one):
    h, E, b = case(one=one)
    both = [value_and_gradients(lambda: CrossEntropy()(cls(36, 6), Out(h, E), b), h, E) for cls in (Plain, Own)]
    for x, y in zip(*both): assert torch.allclose(x, y, atol=1e-5)

def test_an_own_score_is_asked():
    class Halved(SeqModel):
        def score(self, h, E, b=None, items=None): return SeqModel.score(self, h, E, b, items) / 2
    h, E, b = case()
    for name in LOSSES:
        loss = lambda model, h: LOSSES[name]()(model, Out(h, E), b)
        with drawing(0): x = loss(Halved(36, 6), h)
        with drawing(0): y = loss(Plain(36, 6), h / 2)
        assert torch.allclose(x, y, atol=1e-5), name

@pytest.mark.parametrize('cls', [Live, LiveOwn])
@pytest.mark.parametrize('chunk', [1, 3, 512])
def test_padding_as_a_class(cls, chunk):
    "`first_id = 0`: row 0 is a class that is never right, with the gradient of one"
    h, E, b = case()
    mine = value_and_gradients(lambda: CrossEntropy(chunk)(cls(36, 6), Out(h, E), b), h, E)
    for x, y in zip(mine, value_and_gradients(lambda: naive_live(h, E, b), h, E)): assert torch.allclose(x.double(), y.double(), rtol=2e-5, atol=1e-5)
    assert mine[2][0].any()
    with torch.no_grad(): E[0] = 9 * h.detach()[0, 0]                # padding that fits the first history
    live, dead = (CrossEntropy(chunk)(c(36, 6), Out(h, E), b) for c in (cls, Plain))
    assert live > dead + .1

def test_padding_as_a_class_in_bf16_and_without_gradients():
    h, E, b = case(scale=.7)
    with torch.autocast('cpu', torch.bfloat16): mine = value_and_gradients(lambda: CrossEntropy(4)(Live(36, 6), Out(h.bfloat16(), E), b), h, E)
    want = value_and_gradients(lambda: naive_live(h, E, b), h, E)
    assert abs(mine[0] - want[0]) < .02 * want[0]
    for x, y in zip(mine[1:], want[1:]): assert (x - y).norm() < .03 * y.norm()
    with torch.no_grad(): assert torch.allclose(CrossEntropy()(Live(36, 6), Out(h, E), b).double(), naive_live(h, E, b))

@pytest.mark.parametrize('cls', [Plain, Live])
@pytest.mark.parametrize('name', ['bce', 'bpr', 'ss', 'gbce'])
def test_padding_is_never_a_negative(cls, name):
    "Neither where it is a class of the cross-entropy, nor in batches of empty rows, nor with a pool"
    items = torch.tensor([[0, 0], [0, 0], [3, 0], [4, 5]]); b = Batch(items, torch.tensor([7, 2, 4, 1]), n_targets=4)
    one = Batch(items[:2, :1], b.target[:2], n_targets=2)
    for batch in (b, one):
        g = torch.Generator().manual_seed(0); h, E = (torch.randn(*s, 6, generator=g).requires_grad_() for s in ((len(batch), batch.items.shape[1]), (9,)))
        for exclude in ('target', 'window'):
            for shared in (False, True):
                for pool in (None, torch.arange(1, 9)):
                    loss = make_loss(name, 4, pool); loss.negatives.exclude, loss.negatives.shared = exclude, shared
                    for seed in range(20):
                        with drawing(seed): value = loss(cls(8, 6), Out(h, E), batch)
                        gE = torch.autograd.grad(value, E)[0]
                        assert value.isfinite() and gE.isfinite().all() and not gE[0].any()
                        with drawing(seed): ids, ok = loss.negatives(9, batch, batch.target, torch.arange(len(batch)))
                        ids = ids.expand(len(batch), -1)
                        assert ids.min() >= 1 and not (ok & (ids == batch.target[:, None])).any()
                        if exclude == 'window': assert not (ok[..., None] & (ids[..., None] == batch.items[:, None])).any()

# all positions at once, or one prefix a row

@pytest.mark.parametrize('positions, same', [('start', True), ('none', True), ('end', False)])
@pytest.mark.parametrize('norm', ['pre', 'post', 'query'])
def test_all_positions_are_all_prefixes(positions, norm, same):
    "Counted from the end, a position means another thing in a prefix: only there the two may differ"
    reseed(0); model = SASRec(30, d_model=8, max_len=9, dropout=0., norm=norm, positions=positions, init_std=.4)
    _, _, b = case(V=31, B=6, L=9)
    loss, params = CrossEntropy(4), list(model.parameters())
    whole = loss(model, model(b), b); g_whole = torch.autograd.grad(whole, params, allow_unused=True)
    parts = []
    for k in range(1, 10):                                        # prefixes of k items, of all rows that have them
        r = b.length >= k
        if r.any(): one = Batch(b.items[r, :k], b.target[r, k - 1]); parts.append(loss(model, model(one), one) * int(r.sum()))
    mean = sum(parts) / b.n_targets; g_mean = torch.autograd.grad(mean, params, allow_unused=True)
    assert torch.allclose(whole, mean, atol=1e-5) == same
    if same: assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(g_whole, g_mean) if x is not None)

# negatives

@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('exclude', ['target', 'window'])
@pytest.mark.parametrize('one', [False, True], ids=['all', 'one'])
def test_legal_negatives(shared, exclude, one):
    "No negative that counts is padding, the target, or (if so asked) in the row's window"
    _, _, b = case(V=20, B=6, one=one)
    t, row = (b.target, torch.arange(6)) if one else (b.target[b.target > 0], (b.target > 0).nonzero()[:, 0])
    some = 0
    for seed in range(20):
        with drawing(seed): ids, ok = Negatives(15, shared, exclude)(20, b, t, row)
        ids = ids.expand(len(t), -1)
        assert ids.shape == ok.shape == (len(t), 15) and ids.min() >= 1 and ids.max() < 20
        for n in range(len(t)):
            legal = set(ids[n, ok[n]].tolist()); some += len(legal)
            assert int(t[n]) not in legal
            if exclude == 'window': assert not legal & {*b.items[row[n]].tolist(), *b.target[row[n]].reshape(-1).tolist()}
    assert some

def chi2(ids, legal):
    "Of counts against the uniform law over the legal ids, in standard deviations"
    count = torch.bincount(ids.flatten(), minlength=max(legal) + 1)[legal].double(); n = len(legal)
    assert count.sum() == ids.numel()
    return ((count - count.mean()) ** 2 / count.mean()).sum().sub(n - 1).item() / math.sqrt(2 * (n - 1))

@pytest.mark.parametrize('exclude, V', [('target', 12), ('window', 12)])
def test_negatives_are_uniform(exclude, V):
    b = Batch(torch.tensor([[3, 5, 5]]), torch.tensor([9]))
    out = {9} if exclude == 'target' else {3, 5, 9}; legal = [i for i in range(1, V) if i not in out]
    with drawing(1): ids, ok = Negatives(40_000, exclude=exclude)(V, b, b.target, torch.tensor([0]))
    assert abs(chi2(ids[ok], legal)) < 4
    left = 1 - ok.double().mean()                                   # three draws are tried
    assert abs(left - (len(out) / (V - 1)) ** 3) < .01
    assert abs(chi2(torch.tensor(legal).repeat(100)[:-30], legal)) < 4 < chi2(torch.tensor([*legal, legal[0]]).repeat(300), legal)

def test_shared_negatives_are_uniform():
    b = Batch(torch.tensor([[3]]), torch.tensor([9]))
    with drawing(1): ids, ok = Negatives(40_000, shared=True)(12, b, b.target, torch.tensor([0]))
    assert ids.shape == (40_000,) and abs(chi2(ids, list(range(1, 12)))) < 4 and ((ids != 9) == ok[0]).all()

@pytest.mark.parametrize('name', ['bce', 'bpr', 'ss', 'gbce'])
def test_a_user_who_has_seen_everything(name):
    "No legal negative: a finite loss that does not push anything the wrong way"
    h, E, _ = case(V=4, B=1, L=3)
    b = Batch(torch.tensor([[1, 2, 3]]), torch.tensor([1]), n_targets=1)
    loss = make_loss(name, 5); loss.negatives.shared, loss.negatives.exclude = False, 'window'
    with drawing(0): value = loss(Plain(3, 6), Out(h, E), b)
    grads = torch.autograd.grad(value, (h, E), allow_unused=True)
    assert value.isfinite() and all(g is None or g.isfinite().all() for g in grads)
    with drawing(0): assert not Negatives(5, exclude='window')(4, b, b.target, torch.tensor([0]))[1].any()
    E1 = grads[1]
    if E1 is not None: assert not E1[2:].any()                      # the other two items were no negatives

@pytest.mark.parametrize('name', ['bce', 'bpr', 'ss', 'gbce'])
def test_negatives_come_from_the_counter(name):
    h, E, b = case()
    def at(*key):
        with drawing(*key): return make_loss(name, 3)(Plain(36, 6), Out(h, E), b)
    x = at(0, 'step', 5); torch.rand(7)
    assert torch.equal(x, at(0, 'step', 5)) and not torch.equal(x, at(0, 'step', 6))

def test_bad_arguments():
    with pytest.raises(ValueError, match='at least one'): Negatives(0)
    with pytest.raises(ValueError, match="did you mean 'window'"): Negatives(1, exclude='windows')
    with pytest.raises(ValueError, match="did you mean 'gbce'"): make_loss('gbse')
    with pytest.raises(ValueError, match='no negatives'): make_loss('ce', 5)
    assert make_loss('ss', 7).negatives.k == 7 and make_loss('bce').negatives.k == 1

# hard negatives

def pooled(N=40_000, known=((3, 5), 9), pool=(1, 3, 4, 7, 9, 11), V=15, k=2, exclude='window', seed=0, shared=False):
    "Negatives of N positions of one row with a known history and target"
    items, target = torch.tensor([known[0]]), torch.tensor([known[1]])
    with drawing(seed): return Negatives(k, shared, exclude, pool=torch.tensor(pool))(
        V, Batch(items, target), target.expand(N), torch.zeros(N, dtype=torch.long))

@pytest.mark.parametrize('exclude, legal', [('window', [1, 4, 7, 11]), ('target', [1, 3, 4, 7, 11])])
@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_hard_negatives_are_distinct_and_uniform(exclude, legal, k):
    "Every subset of k legal items of the pool has the same chance, so every item and every pair has"
    ids, ok = pooled(exclude=exclude, k=k)
    assert ok.all() and ids.shape == (40_000, k) and set(ids.flatten().tolist()) == set(legal)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    if k < len(legal): # with k of k items the counts are exact, not random; distinct draws vary less by (n-k)/(n-1)
        n, count = len(legal), torch.bincount(ids.flatten(), minlength=15)[legal].double()
        stat = ((count - count.mean()) ** 2 / count.mean()).sum() * (n - 1) / (n - k)
        assert abs(stat - (n - 1)) < 4 * math.sqrt(2 * (n - 1))
    if k == 2:
        code = ids.sort(1).values @ torch.tensor([15, 1])
        pairs = [15 * a + b for i, a in enumerate(legal) for b in legal[i + 1:]]
        assert abs(chi2(code, pairs)) < 4

@pytest.mark.parametrize('one', [False, True], ids=['all', 'one'])
@pytest.mark.parametrize('exclude', ['target', 'window'])
def test_hard_negatives_of_a_batch(one, exclude):
    "Row by row: from the pool and nothing known, or, where too few are left, uniform and legal"
    _, _, b = case(V=30, B=12, L=9, one=one)
    t, row = (b.target, torch.arange(12)) if one else (b.target[b.target > 0], (b.target > 0).nonzero()[:, 0])
    pool, fell = torch.tensor([2, 29, 11, 7, 5, 23]), 0
    for seed in range(20):
        with drawing(seed): ids, ok = Negatives(5, exclude=exclude, pool=pool)(30, b, t, row)
        assert ids.shape == ok.shape == (len(t), 5)
        for n in range(len(t)):
            known = {*b.items[row[n]].tolist(), *b.target[row[n]].reshape(-1).tolist()} if exclude == 'window' else {int(t[n])}
            left = set(pool.tolist()) - known
            if len(left) < 5: fell += 1; assert not set(ids[n, ok[n]].tolist()) & (known | {0})
            else: assert ok[n].all() and len(set(ids[n].tolist())) == 5 and set(ids[n].tolist()) <= left
    assert (fell > 0) == (exclude == 'window')

def test_hard_negatives_fall_back_to_uniform():
    "One legal item of the pool is left and two are asked for: as if there were no pool"
    ids, ok = pooled(known=((1, 3, 4, 7, 9), 5), k=2)
    legal = [i for i in range(1, 15) if i not in (1, 3, 4, 5, 7, 9)]
    assert abs(chi2(ids[ok], legal)) < 4 and (ids[:, 0] == ids[:, 1]).any()
    assert abs(ok.double().mean() - (1 - (6 / 14) ** 3)) < .01

def test_hard_negatives_of_a_user_who_has_seen_everything():
    ids, ok = pooled(N=50, known=(tuple(range(1, 15)), 14), k=3)
    assert not ok.any() and ids.min() >= 1 and ids.max() < 15

@pytest.mark.parametrize('exclude, out', [('window', {3, 5, 9}), ('target', {9})])
def test_shared_hard_negatives(exclude, out):
    "One draw for the batch; a position leaves out what it may not have"
    seen = torch.zeros(15)
    for seed in range(600):
        ids, ok = pooled(N=3, k=4, seed=seed, shared=True, exclude=exclude)
        assert ids.shape == (4,) and ok.shape == (3, 4) and len(set(ids.tolist())) == 4
        assert [i in out for i in ids.tolist()] == (~ok[0]).tolist() and (ok == ok[0]).all()
        seen[ids] += 1
    assert set(seen.nonzero().flatten().tolist()) == {1, 3, 4, 7, 9, 11} and (seen[seen > 0] / 600 - 4 / 6).abs().max() < .08

def test_without_a_pool_the_draws_are_as_before():
    "Stored runs stay what they are: the first draw is one randint, redrawn where it collides"
    _, _, b = case(V=20, B=6); t, row = b.target[b.target > 0], (b.target > 0).nonzero()[:, 0]
    with drawing(3): want = torch.randint(1, 20, (15,), generator=rng())
    for exclude in ('target', 'window'):
        with drawing(3): assert torch.equal(Negatives(15, True, exclude)(20, b, t, row)[0], want)
        with drawing(3): first, second = (torch.randint(1, 20, (len(t), 15), generator=rng()) for _ in range(2))
        with drawing(3): ids, ok = Negatives(15, False, exclude, tries=1)(20, b, t, row)
        assert torch.equal(ids, first)
        with drawing(3): again, _ = Negatives(15, False, exclude, tries=2)(20, b, t, row)
        assert torch.equal(again, torch.where(ok, first, second))

@pytest.mark.parametrize('name', ['bce', 'bpr', 'ss', 'gbce'])
def test_losses_with_a_pool(name):
    "The pool reaches the loss; only its items and the targets have a gradient; a counter decides the draw"
    h, E, b = case(); pool = [4, 8, 15, 16, 23, 30, 31, 32, 33, 35]
    def at(*key):
        with drawing(*key): return make_loss(name, 3, pool)(Plain(36, 6), Out(h, E), b)
    x = at(0, 'step', 5); torch.rand(7)
    assert torch.equal(x, at(0, 'step', 5)) and not torch.equal(x, at(0, 'step', 6)) and x.isfinite()
    if name in ('ss', 'gbce'):
        moved = set(torch.autograd.grad(x, E)[0].any(1).nonzero().flatten().tolist())
        assert moved <= {*pool, *b.target[b.target > 0].tolist()}
    assert make_loss(name, pool=torch.tensor(range(1, 300))).negatives.k == make_loss(name).negatives.k
    assert make_loss(name).negatives.pool is None

def test_bad_pools():
    with pytest.raises(ValueError, match='no negatives'): make_loss('ce', pool=[1, 2])
    with pytest.raises(ValueError, match='pool of 2 items cannot give 3'): make_loss('bpr', 3, [1, 2])
    for pool in ([1, 1, 2], [0, 1, 2], [[1, 2]]):
        with pytest.raises(ValueError, match='distinct item ids'): Negatives(1, pool=pool)
    with pytest.raises(ValueError, match='unbiased'): SampledSoftmax(1, unbiased=True, pool=[1, 2])

# formulas of the sampled losses

def scores(N=6, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=g), torch.randn(N, k, generator=g), torch.rand(N, k, generator=g) < .7

def sigma(x): return 1 / (1 + math.exp(-float(x)))

def test_formulas():
    pos, neg, ok = scores(); V = 12
    pick = lambda n: [float(x) for x, o in zip(neg[n], ok[n]) if o]
    mean = lambda xs: sum(xs) / max(1, len(xs))
    want = dict(bce=[-math.log(sigma(p)) + mean([-math.log(1 - sigma(x)) for x in pick(n)]) for n, p in enumerate(pos)],
                bpr=[mean([-math.log(sigma(p - x)) for x in pick(n)]) for n, p in enumerate(pos)],
                ss=[-math.log(math.exp(p) / (math.exp(p) + sum(math.exp(x) for x in pick(n)))) for n, p in enumerate(pos)])
    alpha = 4 / (V - 2)
    beta = alpha * (.75 * (1 - 1 / alpha) + 1 / alpha)
    want['gbce'] = [-math.log(sigma(p) ** beta) + sum(-math.log(1 - sigma(x)) for x in pick(n)) for n, p in enumerate(pos)]
    for name, w in want.items(): assert torch.allclose(LOSSES[name](4).rows(pos, neg, ok, V).double(), torch.tensor(w).double(), atol=1e-5), name

@pytest.mark.parametrize('one', [False, True], ids=['all', 'one'])
@pytest.mark.parametrize('name', ['bce', 'bpr', 'ss', 'gbce'])
def test_sampled_losses_are_means_over_targets(name, one):
    h, E, b = case(one=one)
    with drawing(4): value = make_loss(name, 3)(Plain(36, 6), Out(h, E), b)
    at = [(r, int(b.length[r]) - 1) for r in range(5)] if one else (b.target > 0).nonzero().tolist()
    t = b.target if one else b.target[b.target > 0]
    loss = make_loss(name, 3)
    with drawing(4): ids, ok = loss.negatives(37, b, t, torch.tensor([r for r, _ in at]))
    ids = ids.expand(len(t), -1)
    pos = torch.stack([h[a, c] @ E[i] for (a, c), i in zip(at, t)]); neg = torch.stack([E[i] @ h[a, c] for (a, c), i in zip(at, ids)])
    assert torch.allclose(value, loss.rows(pos, neg, ok, 37).mean(), atol=1e-5)

def fitted(loss, p, k, draws=60_000, seed=0):
    "Scores of n items that minimise a sampled loss, where the target follows the law p"
    n = len(p); g = torch.Generator().manual_seed(seed)
    t = torch.multinomial(p, draws, True, generator=g) + 1
    s = torch.zeros(n + 1, dtype=torch.float64, requires_grad=True)
    with drawing(seed): ids, ok = Negatives(k, tries=12)(n + 1, Batch(t[:, None], t), t, torch.arange(draws))
    opt = torch.optim.LBFGS([s], 1., 30, line_search_fn='strong_wolfe')
    def closure():
        opt.zero_grad(); value = loss.rows(s[t], s[ids], ok, n + 1).mean(); value.backward(); return value
    opt.step(closure)
    return s[1:].detach()

@pytest.mark.parametrize('k', [1, 3, 9])
def test_gbce_calibration(k):
    "With t = 1 the sigmoid of a score is the item's probability; with t = 0 it is too sure, as plain BCE"
    p = torch.tensor([.4, .2, .1, .08, .06, .05, .04, .03, .02, .02], dtype=torch.float64); n, alpha = 10, k / 9
    assert (fitted(GBCE(k, t=1.), p, k).sigmoid() - p).abs().max() < .015
    for t in (0., .75):
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        want = p * beta / (p * beta + (1 - p) * alpha)
        assert (fitted(GBCE(k, t=t), p, k).sigmoid() - want).abs().max() < .015
    if k < 9: assert (fitted(GBCE(k, t=0.), p, k).sigmoid() - p).max() > .1

def test_gbce_of_all_negatives_is_bce_sum():
    pos, neg, _ = scores(k=10); ok = torch.ones(6, 10, dtype=torch.bool)
    for t in (0., .5, 1.): assert torch.allclose(GBCE(10, t=t).rows(pos, neg, ok, 12), F.softplus(-pos) + F.softplus(neg).sum(1))

@pytest.mark.parametrize('V', [12, 400])
@pytest.mark.parametrize('shared', [True, False])
def test_unbiased_sampled_softmax_becomes_full(V, shared):
    h, E, b = case(V=V, B=3, L=3); model = Plain(V - 1, 6)
    full = naive(h, E, b); gap = []
    for k in (4, 40_000):
        with drawing(0): gap.append(abs(SampledSoftmax(k, shared, unbiased=True)(model, Out(h, E), b) - full).item())
    assert gap[1] < .02 and gap[1] < gap[0]

def test_plain_sampled_softmax_does_not():
    h, E, b = case(V=12, B=3, L=3)
    with drawing(0): assert SampledSoftmax(4000)(Plain(11, 6), Out(h, E), b) > naive(h, E, b) + 1

def test_unbiased_sum_is_unbiased():
    "The mean over draws of the estimated partition sum is the sum over all other items"
    V, k = 12, 3; h, E, _ = case(V=V, B=1, L=1)
    b = Batch(torch.tensor([[3]]), torch.tensor([5]), n_targets=1); s = (E @ h[0, 0]).detach().double()
    want = s[1:].exp().sum() - s[5].exp()
    for shared in (True, False):
        total = []
        for seed in range(3000):
            with drawing(seed): loss = SampledSoftmax(k, shared, unbiased=True)(Plain(V - 1, 6), Out(h.detach(), E.detach()), b)
            total.append(math.expm1(loss) * float(s[5].exp()))
        total = torch.tensor(total); error = total.std() / len(total) ** .5
        assert abs(total.mean() - want) < 4 * error, f'{total.mean():.3f} is not {want:.3f} ± {error:.3f}, shared {shared}'
