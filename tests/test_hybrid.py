"HybridSASRecGNN and its variants, the graph alone, two-stage training: what each must equal, and twins with the faults."
import copy, json
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import seqrec_nb.models.base as base
from seqrec_nb.blocks.fusion import FUSIONS
from seqrec_nb.blocks.graph import GAT, LightGCN
from seqrec_nb.cli import main
from seqrec_nb.core import Batch, drawing, reseed
from seqrec_nb.data.graph import item_graph
from seqrec_nb.data.loader import EvalLoader, Loader
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out
from seqrec_nb.evaluate import ranks
from seqrec_nb.experiment import Experiment, Interrupted, build, read_metrics, run
from seqrec_nb.losses import BPR, CrossEntropy, make_loss
from seqrec_nb.models.base import CHECKS, MODELS, check_model, create, model_class, settings
from seqrec_nb.models.hybrid import GraphRec, HybridSASRecGNN, prefix_lengths
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.pretrain import pretrain_graph
from seqrec_nb.record import loaders
from seqrec_nb.train import Callback, Trainer, backward
from seqrec_nb.training import popular

N = 30
LEARNED = [k for k in FUSIONS if k not in ('fixed', 'discrete')]
VARIANTS = ['hybrid_fixed', 'hybrid_discrete', 'hybrid_learnable', 'hybrid_continuous', 'hybrid_piecewise', 'hybrid_gat']
SMALL = dict(d_model=16, n_heads=2, n_blocks=1, dropout=0., max_len=12)

def histories(users=40, n_items=N, longest=30, seed=0, step=None):
    "Random histories, or walks around a ring of items; and what `load` would return for them"
    rng = np.random.default_rng(seed); n = rng.integers(4, longest, users)
    one = lambda k: (rng.integers(n_items) + np.arange(k) * step) % n_items if step else rng.integers(0, n_items, k)
    return dataset(np.concatenate([one(k) for k in n]) + 1, n, n_items)

def dataset(items, n, n_items=N):
    return leave_one_out(Sequences(items.astype(np.int32), np.r_[0, np.cumsum(n)], None, np.arange(len(n)), np.arange(n_items)))

DATA = histories(); GRAPH = item_graph(DATA, min_count=2)

def hybrid(graph=GRAPH, cls=HybridSASRecGNN, seed=0, n_items=N, **kw):
    "A hybrid with weights far from zero, so that differences would show"
    reseed(seed, 'weights')
    model = cls(n_items, graph, **{**SMALL, 'init_std': .3, **kw})
    with torch.no_grad():
        model.gnn.item.weight.mul_(15.); model.project.bias.normal_()
    return model.eval()

def graphrec(**kw):
    reseed(0, 'weights'); model = GraphRec(N, GRAPH, **{**dict(d_model=16, max_len=12), **kw})
    with torch.no_grad(): model.gnn.item.weight.mul_(15.)
    return model.eval()

def rows(lengths, n_items=N, width=None, seed=1, targets=False, true=None):
    g = torch.Generator().manual_seed(seed); n = torch.tensor(lengths)
    items = torch.randint(1, n_items + 1, (len(n), (width or max(lengths)) + 1), generator=g)
    real = torch.arange(items.shape[1] - 1) < n[:, None]
    return Batch(items[:, :-1] * real, items[:, 1:] * real if targets else None, length=torch.tensor(true or lengths), n_targets=int(n.sum()))

def trainer(model, data=DATA, loss='ce', samples='all', threads=1, callbacks=(), seed=0, lr=3e-3, batch_size=8, max_len=12, parts=4, **kw):
    loss = make_loss(loss) if isinstance(loss, str) else loss
    return Trainer(model, Loader(data.train, max_len, batch_size, samples, parts=parts, seed=seed), loss, lr, seed=seed, threads=threads, callbacks=callbacks, **kw)

class StopAt(Callback):
    def __init__(self, step): self.step = step
    def on_step_end(self, t): t.stop = 'enough' if t.step == self.step else None

class Steps(Callback):
    "Losses of all steps"
    def __init__(self): self.losses = []
    def on_step_end(self, t): self.losses.append(float(t.last_loss))

def steps(model, n, **kw):
    t = trainer(model, callbacks=[StopAt(n)], **kw); t.fit(99); return t

def weights(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def count_calls(module):
    "A list that grows with each forward pass of the module"
    calls = []; module.register_forward_hook(lambda *a: calls.append(1)); return calls

# ---- every model passes every check, every fault is caught ----

@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
@pytest.mark.parametrize('score_with', ['seq', 'gnn', 'fused'])
@pytest.mark.parametrize('level', ['input', 'output'])
@pytest.mark.parametrize('fusion', FUSIONS)
def test_every_combination_passes_the_checks(fusion, level, score_with, gnn, monkeypatch):
    "All checks but learning by heart, which the next test does for some"
    monkeypatch.setattr(base, '_overfit', lambda model: 0.)
    reseed(0); m = HybridSASRecGNN(N, GRAPH, fusion, fusion_level=level, score_with=score_with, gnn=gnn, gnn_layers=1, **{**SMALL, 'd_model': 8})
    assert list(check_model(m)) == [*CHECKS, 'overfit']

@pytest.mark.parametrize('kw', [dict(score_with='fused'), dict(fusion_level='output', fusion_type='piecewise'), dict(gnn='gat', score_with='gnn', fusion_type='learnable', gnn_layers=1),
                                dict(alpha_per='user', fusion_type='continuous')], ids=str)
def test_some_learn_a_batch_by_heart(kw):
    reseed(0); assert float(check_model(HybridSASRecGNN(N, GRAPH, **SMALL, **kw))['overfit'].split('%')[0]) < 5

@pytest.mark.parametrize('kw', [dict(), dict(gnn='gat', gnn_layers=1), dict(decay=1.), dict(gnn_layers=0)], ids=str)
def test_the_graph_alone_passes_the_checks(kw, monkeypatch):
    if kw: monkeypatch.setattr(base, '_overfit', lambda model: 0.)
    reseed(0); check_model(GraphRec(N, GRAPH, 16, 12, **kw))

class CachedTable(HybridSASRecGNN):
    "The original's LightGCNSeq: the graph's output computed once, without gradients"
    @torch.no_grad()
    def cached(self):
        if not hasattr(self, 'kept'): self.kept = super().table()
        return self.kept
    def table(self): return self.cached()

class DetachedGraph(HybridSASRecGNN):
    def table(self): E = super().table(); return torch.cat([E[:, :self.d_model], E[:, self.d_model:].detach()], 1)

class LeakyPadding(HybridSASRecGNN):
    "The projection's bias reaches the row of padding"
    def table(self): return torch.cat([self.item.weight, self.project(self.gnn())], 1)

class PerUser(HybridSASRecGNN):
    "One α for all positions of a history, trained on all of them"
    def __init__(self, *a, **kw): super().__init__(*a, **{**kw, 'alpha_per': 'user'}); self.causal = True

class WindowLength(HybridSASRecGNN):
    "Lengths of the window in the place of the history's"
    def weights(self, b): return super().weights(Batch(b.items))

class LastPaddedAlpha(HybridSASRecGNN):
    "α by the width of the batch"
    def weights(self, b): return self.fusion(torch.full_like(b.items, b.items.shape[1]))[..., None]

@pytest.mark.parametrize('cls, check', [(CachedTable, 'gradients'), (DetachedGraph, 'gradients'), (LastPaddedAlpha, 'padding|batch')], ids=lambda v: getattr(v, '__name__', None))
def test_faults_are_caught(cls, check):
    with pytest.raises(AssertionError, match=f'^{cls.__name__}: ({check})'): check_model(cls(N, GRAPH, 'discrete', L_short=3, L_long=6, **SMALL))

# ---- readout and padding ----

EACH = [dict(), dict(fusion_level='output'), dict(score_with='fused'), dict(gnn='gat', gnn_layers=1), dict(alpha_per='user'), dict(positions='start', fusion_type='continuous')]

@pytest.mark.parametrize('kw', EACH, ids=str)
@torch.no_grad()
def test_alone_in_a_batch_and_padded_alike(kw):
    m, b = hybrid(**{**kw, 'max_len': 70, 'fusion_type': 'continuous'}), rows([1, 2, 10, 11, 49, 50, 51, 70])
    s = m.scores(b)
    for r, n in enumerate(b.length.tolist()):
        for width in {n, min(70, n + 1), 70}:
            one = m.scores(Batch(F.pad(b.items[r:r + 1, :n], (0, width - n)), length=b.length[r:r + 1]))
            assert torch.allclose(one, s[r:r + 1], atol=2e-4, rtol=1e-4)
    assert (s[:, 1:].std(1) > .1).all()

@pytest.mark.parametrize('make', [lambda: hybrid(max_len=50), lambda: hybrid(max_len=50, fusion_level='output', positions='none'), lambda: graphrec(max_len=50)], ids=['input', 'output', 'graph'])
@torch.no_grad()
def test_every_length_reads_its_last_item(make):
    m, b = make(), rows(list(range(1, 51)))
    other = b.items.clone(); at = torch.arange(50); other[at, b.last] = other[at, b.last] % N + 1
    assert ((m.scores(b) - m.scores(Batch(other, length=b.length)))[:, 1:].abs().amax(1) > 1e-3).all()

@torch.no_grad()
def test_nothing_outside_the_window_is_read():
    "Only the number of the items that are cut off may count, not which they are"
    items, n = np.arange(1, 201) % N + 1, [100, 100]
    other = items.copy(); other[:85] = 1; other[100:185] = 2
    a, c = (EvalLoader(dataset(x, n).test, 12) for x in (items, other))
    (a,), (c,) = a, c
    assert (a.length == 99).all() and torch.equal(a.items, c.items)
    for m in (hybrid(), graphrec()): assert torch.equal(m.scores(a), m.scores(c))

@torch.no_grad()
@pytest.mark.parametrize('kw', EACH, ids=str)
def test_an_empty_history_is_finite(kw):
    none = Batch(torch.zeros(2, 5, dtype=torch.long), length=torch.zeros(2, dtype=torch.long))
    assert hybrid(**kw).scores(none)[:, 1:].isfinite().all() and graphrec().scores(none)[:, 1:].isfinite().all()

# ---- whose length ----

def test_lengths_of_prefixes_count_what_is_cut_off():
    b = rows([3, 2, 1], width=3, true=[40, 2, 1])
    n = prefix_lengths(b)
    assert n[0].tolist() == [38, 39, 40] and n[1, :2].tolist() == [1, 2] and n[2, 0] == 1
    assert prefix_lengths(Batch(b.items)).tolist() == [[1, 2, 3]] * 3

def test_each_position_has_its_own_alpha():
    m = hybrid(L_short=2, L_long=4)
    b = rows([6, 3], true=[6, 5])
    assert torch.allclose(m.weights(b)[0, :, 0], torch.tensor([.3, .3, .5, .5, .7, .7]))
    assert torch.allclose(m.weights(b)[1, :3, 0], torch.tensor([.5, .5, .7]))
    user = hybrid(L_short=2, L_long=4, alpha_per='user').weights(b)[..., 0]
    assert torch.allclose(user, torch.tensor([[.7], [.7]]).expand(2, 6))

def prefixes_agree(m, b):
    "h of every position of a pass over the histories is that of a pass over its prefix"
    h = m(b).h
    for r in range(len(b)):
        for t in range(1, int(b.mask[r].sum()) + 1):
            one = Batch(b.items[r:r + 1, :t], length=b.length[r:r + 1] - int(b.mask[r].sum()) + t)
            if not torch.allclose(m(one).h[0, -1], h[r, t - 1], atol=1e-4): return False
    return True

LENGTHS = dict(L_short=3, L_long=6)

@pytest.mark.parametrize('true', [[9, 4, 1], [48, 12, 6]], ids=['whole', 'cut'])
@pytest.mark.parametrize('level', ['input', 'output'])
@pytest.mark.parametrize('positions', ['start', 'none'])
@torch.no_grad()
def test_one_pass_is_a_pass_over_each_prefix(positions, level, true):
    b = rows([9, 4, 1], true=true)
    for fusion in FUSIONS: assert prefixes_agree(hybrid(fusion_type=fusion, positions=positions, fusion_level=level, score_with='fused', **LENGTHS), b)
    assert prefixes_agree(graphrec(), b)

@torch.no_grad()
def test_one_alpha_for_a_user_would_be_seen():
    b = rows([9, 4, 1])
    assert not prefixes_agree(hybrid(cls=PerUser, positions='start', **LENGTHS), b)
    cut = rows([9, 4, 1], true=[48, 12, 6])
    assert prefixes_agree(hybrid(positions='none', **LENGTHS), cut) and not torch.allclose(
        hybrid(cls=WindowLength, positions='none', **LENGTHS).scores(cut), hybrid(positions='none', **LENGTHS).scores(cut), atol=1e-3)

@pytest.mark.parametrize('kw', [dict(), dict(fusion_level='output', fusion_type='learnable'), dict(score_with='fused', fusion_type='piecewise')], ids=str)
def test_loss_of_all_positions_is_the_sum_over_prefixes(kw):
    "And so are the gradients; one α for a user breaks it"
    def total(samples, cls=HybridSASRecGNN):
        m = hybrid(cls=cls, positions='start', alpha_reg=0., max_len=30, L_short=4, L_long=12, **kw)
        for parts in Loader(DATA.train, 30, 10**6, samples).steps(0):
            for b in parts: (CrossEntropy()(m, m(b), b) * b.n_targets).backward()
            n = sum(b.n_targets for b in parts)
        return n, {k: p.grad for k, p in m.named_parameters()}
    (n, g), (k, h) = total('all'), total('prefix')
    assert n == k and all(torch.allclose(g[x], h[x], rtol=1e-3, atol=2e-3 * float(h[x].abs().max())) for x in g)
    _, wrong = total('all', PerUser)
    assert not torch.allclose(wrong['item.weight'], h['item.weight'], rtol=1e-2, atol=.05 * float(h['item.weight'].abs().max()))

# ---- α at its ends, and between them ----

def plain(m, **kw):
    "SASRec with the same weights"
    s = SASRec(N, **{**SMALL, **kw}).train(m.training)
    s.load_state_dict({k: v for k, v in m.state_dict().items() if k in s.state_dict()}); return s

def loss_and_gradients(m, b):
    m.zero_grad()
    with drawing(3): out = m(b)
    loss = CrossEntropy()(m, out, b); loss.backward()
    return out.h.detach(), loss.detach(), {k: p.grad for k, p in m.named_parameters()}

@pytest.mark.parametrize('kw', [dict(), dict(norm='post', positions='start'), dict(norm='query', scale_input=True), dict(n_blocks=2, attn_dropout=.1)], ids=str)
@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
@pytest.mark.parametrize('training', [False, True])
def test_alpha_one_is_sasrec_to_the_bit(training, gnn, kw):
    m = hybrid(fusion_type='fixed', fixed_alpha=1., gnn=gnn, **{'dropout': .3, **kw}).train(training)
    s, b = plain(m, **{'dropout': .3, **kw}), rows([12, 7, 1, 3], targets=True)
    (h, loss, grads), (h2, loss2, want) = loss_and_gradients(m, b), loss_and_gradients(s, b)
    assert torch.equal(h, h2) and torch.equal(loss, loss2) and all(torch.equal(grads[k], want[k]) for k in want)
    assert not any(g.any() for k, g in grads.items() if k not in want and g is not None) and grads['gnn.item.weight'] is not None
    if not training: assert torch.equal(m.scores(b)[:, 1:], s.scores(b)[:, 1:])
    else: assert not torch.equal(h, loss_and_gradients(plain(m.eval(), **kw), b)[0])      # dropout was on

@pytest.mark.parametrize('kw', [dict(fusion_level='output'), dict(score_with='fused'), dict(fusion_level='output', score_with='fused')], ids=str)
def test_alpha_one_is_sasrec_elsewhere_too(kw):
    m, b = hybrid(fusion_type='fixed', fixed_alpha=1., **kw), rows([12, 7, 1, 3], targets=True)
    s = plain(m); (_, loss, grads), (_, loss2, want) = loss_and_gradients(m, b), loss_and_gradients(s, b)
    assert torch.allclose(m.scores(b)[:, 1:], s.scores(b)[:, 1:], atol=1e-5) and torch.allclose(loss, loss2)
    assert all(torch.allclose(grads[k], want[k], atol=1e-6) for k in want)
    assert not any(g.any() for k, g in grads.items() if k not in want and g is not None)

def test_nearly_one_is_not_one():
    b = rows([12, 7]); m = hybrid(fusion_type='fixed', fixed_alpha=.99)
    assert not torch.equal(m.scores(b), plain(m).scores(b))

@pytest.mark.parametrize('level', ['input', 'output'])
@torch.no_grad()
def test_alpha_zero_reads_the_graph_alone(level):
    b = rows([12, 7, 1])
    for alpha, alike in ((0., True), (.01, False)):
        m = hybrid(fusion_type='fixed', fixed_alpha=alpha, fusion_level=level)
        E = m.table(); other = E.clone(); other[:, :16] = other[:, :16].roll(3, 0)
        assert torch.equal(m(b, E).h, m(b, other).h) == alike and not torch.allclose(m.scores(b, E), m.scores(b, other))

@pytest.mark.parametrize('alpha', [.3, .5, .75])
@torch.no_grad()
def test_the_input_is_linear_in_alpha(alpha):
    b = rows([12, 7, 1])
    at = lambda a: (lambda m: m.embed(m.table(), b))(hybrid(fusion_type='fixed', fixed_alpha=a))
    assert torch.allclose(at(alpha), alpha * at(1.) + (1 - alpha) * at(0.), atol=1e-6) and not torch.allclose(at(1.), at(0.), atol=.1)

@torch.no_grad()
def test_the_output_is_a_mixture_of_two_passes():
    m, b = hybrid(fusion_level='output', **LENGTHS), rows([12, 7, 1])
    s = plain(m); E, G = m.table().chunk(2, 1)
    a = m.alpha(torch.arange(1, 13))[None, :, None]
    want = a * s(b, E).h + (1 - a) * s(b, G).h
    assert torch.allclose(m(b).h[b.mask], want[b.mask], atol=1e-5)
    assert torch.allclose(m.scores(b), b.at_last(want) @ E.T, atol=1e-4)

def naive_scores(m, b):
    "(B,V): the fused table of every row, for its input and for its scores"
    E, G = m.table().chunk(2, 1)
    a = m.alpha(b.length)[:, None, None]
    fused = a * E + (1 - a) * G                                                     # (B,V,D)
    x = torch.stack([fused[r][b.items[r]] for r in range(len(b))])
    h = b.at_last(SASRec.body(m, m.place(x, b), b))
    table = dict(seq=E.expand_as(fused), gnn=G.expand_as(fused), fused=fused)[m.score_with]
    return (table @ h[..., None])[..., 0]

@pytest.mark.parametrize('score_with', ['seq', 'gnn', 'fused'])
@pytest.mark.parametrize('fusion', FUSIONS)
@torch.no_grad()
def test_look_up_then_fuse_is_fuse_then_look_up(fusion, score_with):
    m, b = hybrid(fusion_type=fusion, score_with=score_with, alpha_per='user', **LENGTHS), rows([12, 7, 5, 1])
    assert torch.allclose(m.scores(b), naive_scores(m, b), atol=1e-4)
    out, some = m(b), torch.tensor([[3, 9], [1, 2], [30, 4], [7, 7]])
    assert torch.allclose(m.score(b.at_last(out.h), out.E, items=some), m.scores(b).gather(1, some), atol=1e-4)

def test_scores_with_three_tables_differ():
    b = rows([12, 7]); s = [hybrid(score_with=k).scores(b) for k in ('seq', 'gnn', 'fused')]
    assert all((s[i] - s[j]).abs().max() > .1 for i, j in ((0, 1), (0, 2), (1, 2)))

class Largest(TorchDispatchMode):
    "Elements of the largest tensor that any operation makes"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.n = max([self.n, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out

@pytest.mark.parametrize('kw', [dict(), dict(fusion_level='output'), dict(score_with='fused'), dict(alpha_per='user', score_with='fused')], ids=str)
def test_no_tensor_of_rows_times_catalogue_times_width(kw):
    "Forward, all scores of the last position, and backward; the largest tensors are the table, the edges and the scores"
    V, B, D = 801, 16, 16
    g = item_graph(histories(20, n_items=V - 1), min_count=1)
    m, b = hybrid(g, n_items=V - 1, **kw), rows([4] * B, V - 1)
    with Largest() as seen: F.cross_entropy(m.scores(b), torch.ones(B, dtype=torch.long)).backward()
    assert seen.n <= max(2 * V * D, B * V) < B * V * D / 4
    with Largest() as naive: naive_scores(m, b)
    assert naive.n >= B * V * D

# ---- gradients and padding ----

@pytest.mark.parametrize('level', ['input', 'output'])
@pytest.mark.parametrize('fusion', FUSIONS)
def test_everything_learns(fusion, level):
    m = hybrid(fusion_type=fusion, fusion_level=level, max_len=70, dropout=.1).train()
    b = rows([70, 30, 4], targets=True); loss_and_gradients(m, b)
    for k, p in m.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), k
    if fusion in LEARNED: assert all(p.grad.all() for p in m.fusion.parameters()) or fusion == 'continuous_original'
    assert not m.item.weight.grad[0].any() and not m.gnn.item.weight.grad[0].any()

@pytest.mark.parametrize('kw', [*EACH[:4], dict(fusion_type='learnable', score_with='gnn')], ids=str)
def test_padding_stays_nothing(kw):
    m = hybrid(**{'dropout': .1, **kw}); t = steps(m, 10, weight_decay=.1, loss='bpr')
    assert t.step == 10 and m.project.bias.abs().min() > 0
    assert not m.table()[0].any() and not m.item.weight[0].any() and not m.gnn.item.weight[0].any()

def test_a_bias_in_the_row_of_padding_would_be_seen(): assert hybrid(cls=LeakyPadding).table()[0].any()

@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
def test_items_without_neighbours(gnn):
    g = item_graph(DATA, min_count=10**6); assert g.n_edges == 0
    m = hybrid(g, gnn=gnn); loss_and_gradients(m, rows([12, 3], targets=True))
    assert m.table().isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())

def test_g_begins_about_as_long_as_e():
    "Otherwise α does not mean what it says"
    reseed(0); m = HybridSASRecGNN(N, GRAPH); E, G = m.table()[1:].chunk(2, 1)
    assert .5 < G.norm(dim=1).mean() / E.norm(dim=1).mean() < 2

# ---- counts, state, devices ----

def test_parameter_counts():
    "hybrid.md 1.4 and 1.5"
    arch = dict(d_model=64, n_blocks=2, n_heads=2, max_len=50, d_inner=256, norm='post', positions='start')
    g = item_graph(histories(30, n_items=3533)); count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(SASRec(3533, **arch)) == 329_344
    want = {'fixed': 0, 'discrete': 0, 'learnable': 3, 'continuous': 2, 'piecewise': 4, 'learnable_original': 3, 'continuous_original': 97}
    assert {k: count(HybridSASRecGNN(3533, g, k, **arch)) - 559_680 for k in FUSIONS} == want
    assert count(GraphRec(3533, g)) == 64 * 3534 + 64 * 64 + 64

@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
def test_the_graph_moves_and_is_not_saved(gnn):
    m = hybrid(gnn=gnn, fusion_type='piecewise')
    assert {v.device.type for v in [*copy.deepcopy(m).to('meta').buffers(), *copy.deepcopy(m).to('meta').parameters()]} == {'meta'}
    assert set(m.state_dict()) == {k for k, _ in m.named_parameters()}
    other = hybrid(item_graph(DATA, min_count=4), gnn=gnn, fusion_type='piecewise', seed=5)
    other.load_state_dict(m.state_dict())
    assert not torch.allclose(other.table(), m.table(), atol=1e-3)            # another graph, so another table
    again = hybrid(gnn=gnn, fusion_type='piecewise', seed=5); again.load_state_dict(m.state_dict())
    assert torch.equal(again.table(), m.table())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('kw', EACH, ids=str)
def test_same_on_a_gpu(kw):
    m, b = hybrid(**kw), rows([12, 7, 1], targets=True)
    s, loss = m.scores(b).detach(), loss_and_gradients(m, b)[1]
    m = m.cuda(); assert torch.allclose(m.scores(b.to('cuda')).cpu(), s, atol=1e-3)
    assert torch.allclose(loss_and_gradients(m, b.to('cuda'))[1].cpu(), loss, atol=1e-4)

def test_one_table_for_all_batches_is_the_table():
    m, b = hybrid(), rows([12, 7])
    assert torch.equal(m.scores(b), m.scores(b, m.table())) and torch.equal(graphrec().scores(b), graphrec().scores(b, graphrec().table()))

# ---- training ----

@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
@pytest.mark.parametrize('threads', [1, 2])
def test_the_graph_is_gone_through_once_a_step_and_once_an_evaluation(threads, gnn):
    m = hybrid(gnn=gnn, gnn_layers=1); calls = count_calls(m.gnn)
    t = steps(m, 5, threads=threads)
    assert len(calls) == 5 and all(len(parts) > 1 for parts in t.loader.steps(0))
    loader = EvalLoader(DATA.valid, 12, batch_size=7); assert len(list(loader)) > 3
    ranks(m, loader); assert len(calls) == 6

KINDS = [dict(), dict(fusion_type='learnable', fusion_level='output', alpha_reg=.5), dict(gnn='gat', gnn_layers=1, score_with='gnn'),
         dict(fusion_type='continuous', score_with='fused'), dict(fusion_type='piecewise', alpha_per='user')]

def agree(make, samples='all'):
    "One step's loss and gradients: two threads repeat themselves to the bit, and one thread to rounding"
    def grads(threads):
        m = make().train(); t = trainer(m, threads=threads, samples=samples, loss='bpr')
        loss, _ = backward(t, next(t.loader.steps(0)))
        return float(loss), {k: p.grad for k, p in m.named_parameters() if p.requires_grad}
    (l1, g1), (l2, g2), (l3, g3) = grads(1), grads(2), grads(2)
    assert abs(l1 - l2) < 1e-5 * abs(l1) + 1e-6 and l2 == l3 and all(torch.equal(g2[k], g3[k]) for k in g2)
    for k in g1: assert torch.allclose(g1[k], g2[k], rtol=1e-3, atol=1e-5 + 1e-4 * float(g1[k].abs().max())), k

@pytest.mark.parametrize('kw', KINDS, ids=str)
def test_two_threads_are_close_to_one(kw):
    samples = 'prefix' if 'alpha_per' in kw else 'all'
    def make():
        m = hybrid(**kw, dropout=.3)
        with torch.no_grad():
            for p in m.fusion.parameters(): p.add_(.5)
        return m
    agree(make, samples)

@pytest.mark.parametrize('make', [lambda: hybrid().freeze_graph(), lambda: graphrec()], ids=['frozen', 'alone'])
def test_two_threads_with_a_frozen_graph_and_the_graph_alone(make): agree(make)

@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('gnn', ['lightgcn', 'gat'])
def test_one_seed_one_run(gnn, threads):
    def go(seed=0, noise=0):
        s = Steps(); m = hybrid(seed=seed, gnn=gnn, gnn_layers=1, dropout=.2, fusion_type='learnable')
        torch.rand(noise); trainer(m, seed=seed, threads=threads, loss='bpr', callbacks=[s]).fit(1)
        return s.losses, weights(m)
    (l1, w1), (l2, w2), (l3, w3) = go(), go(noise=5), go(1)
    assert l1 == l2 and same(w1, w2) and l1 != l3 and not same(w1, w3)

@pytest.mark.parametrize('kw', [dict(threads=2), dict(threads=1, frozen=True), dict(threads=2, alone=True)], ids=str)
def test_resumed_is_uninterrupted(kw):
    "Another trainer, with other initial weights, takes over in the middle of an epoch"
    threads, frozen, alone = kw['threads'], kw.get('frozen'), kw.get('alone')
    def make(seed=0, *callbacks):
        m = graphrec() if alone else hybrid(seed=seed, dropout=.2, fusion_type='piecewise')
        if frozen: m.freeze_graph()
        if alone and seed: torch.nn.init.normal_(m.read.weight)
        return trainer(m, threads=threads, callbacks=callbacks, loss='bpr')
    whole, first, second = make().fit(3), make(0, StopAt(7)).fit(3), make(9)
    second.load(first.tensors(), first.state()); second.fit(3)
    assert first.step == 7 and same(weights(whole.model), weights(second.model)) and whole.record['loss'] == second.record['loss']

def replaced(at, seed=3):
    "DATA with other items at the places that `at` picks from a history of n"
    s = DATA.seqs; items = s.items.copy(); rng = np.random.default_rng(seed)
    for a, z in zip(s.offsets[:-1], s.offsets[1:]): items[a + at(z - a)] = rng.integers(1, N + 1)
    return dataset(items, s.lengths)

@pytest.mark.parametrize('kw', [dict(), dict(loss='bpr', negatives=2, hard=8), dict(loss='ss', negatives=8), dict(pretrain=1)], ids=str)
def test_validation_and_test_items_are_not_in_the_weights(kw):
    def go(data):
        e = Experiment(model='hybrid_learnable', graph_min_count=2, batch_size=8, **kw, **SMALL)
        m = build(e, data); fit, *_ = loaders(e, data, m, 'cpu')
        if e.pretrain: pretrain_graph(m, fit, e.pretrain)
        loss = make_loss(e.loss, e.negatives, popular(data, e.hard) if e.hard else None)
        t = Trainer(m, fit, loss, callbacks=[StopAt(2)], threads=1); t.fit(1)
        return weights(m), [v for v in m.gnn.graph.buffers()]
    (w, g), (w2, g2), (w3, g3) = go(DATA), go(replaced(lambda n: [n - 2, n - 1])), go(replaced(lambda n: [n - 3]))
    assert same(w, w2) and all(torch.equal(a, b) for a, b in zip(g, g2)) and not same(w, w3)

@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('fusion', ['learnable', 'continuous', 'piecewise'])
def test_the_penalty_is_part_of_the_loss(fusion, threads):
    "Nothing at the start; afterwards alpha_reg times the squared way, whatever the parts and threads"
    def loss(reg, move):
        m = hybrid(fusion_type=fusion, alpha_reg=reg).train()
        with torch.no_grad():
            for p in m.fusion.parameters(): p.add_(move)
        t = trainer(m, threads=threads); value, _ = backward(t, next(t.loader.steps(0)))
        return float(value), float(m.fusion.penalty().detach()), {k: p.grad for k, p in m.fusion.named_parameters()}
    (a, none, _), (b, zero, _) = loss(0., 0.), loss(10., 0.)
    assert a == pytest.approx(b, abs=1e-6) and zero == pytest.approx(0, abs=1e-12)
    (a, _, g), (b, penalty, k) = loss(0., .7), loss(10., .7)
    assert penalty > 1e-3 and b - a == pytest.approx(10 * penalty, rel=1e-3) and all(not torch.allclose(g[n], k[n]) for n in g)

def test_the_penalty_is_of_training_only():
    b = rows([5, 9], targets=True)
    assert hybrid(fusion_type='learnable')(b).aux is None and hybrid(fusion_type='learnable').train()(b).aux['penalty'] == 0
    assert hybrid(fusion_type='discrete').train()(b).aux is None and hybrid(fusion_type='learnable', alpha_reg=0.).train()(b).aux is None

def test_the_penalty_pulls_to_the_start_not_to_zero():
    def alpha(reg):
        m = hybrid(fusion_type='learnable', alpha_reg=reg)
        with torch.no_grad(): m.fusion.alpha.theta.add_(torch.tensor([1., -1., 1.]))
        before = m.alpha(torch.tensor([5])); steps(m, 40, lr=.05, batch_size=40); return (m.alpha(torch.tensor([5])) - .3).abs() / (before - .3).abs()
    assert alpha(1e4) < .1 < alpha(0.)

def hit_share(m, data, at=1):
    "Share of the users whose last training item comes first"
    items = [data.seqs.items[a:z] for a, z in zip(data.train.start, data.train.stop)]
    with torch.inference_mode():
        best = [m(Batch(torch.as_tensor(x[None, -13:-1].astype(int)), length=torch.tensor([len(x) - 1]))) for x in items]
        return np.mean([int(m.score(o.h[:, -1], o.E)[0, 1:].argmax()) + 1 == x[-1] for o, x in zip(best, items)])

@pytest.mark.parametrize('kw', [dict(), dict(fusion_level='output', fusion_type='learnable')], ids=str)
def test_twenty_users_are_learned_by_heart(kw):
    data = histories(20, longest=12, seed=4); m = hybrid(item_graph(data, min_count=1), **kw, init_std=.1)
    before = hit_share(m, data); steps(m, 200, data=data, lr=1e-2, batch_size=20, parts=1)
    assert before < .3 and hit_share(m.eval(), data) > .95

@pytest.mark.parametrize('name', ['hybrid_fixed', 'hybrid_gat', 'lightgcn'])
def test_a_cycle_is_learned(name):
    "The next item is a function of the last: no validation target is missed"
    data = histories(40, n_items=15, longest=25, step=1)
    reseed(0); m = create(name, 15, graph=item_graph(data, min_count=1), **(dict(d_model=32, max_len=12, gnn_layers=1, decay=.3) if name == 'lightgcn' else {**SMALL, 'gnn_layers': 1}))
    loader = EvalLoader(data.test, 12); hr = lambda: float((ranks(m, loader, mask_seen=False).above == 0).mean())
    before = hr(); trainer(m, data, lr=2e-2).fit(25 if name == 'lightgcn' else 12)
    assert before < .7 and hr() == 1

# ---- two stages ----

def test_the_graph_is_trained_then_held():
    m = hybrid(); fit = Loader(DATA.train, 12, 8); before = weights(m)
    losses = pretrain_graph(m, fit, 4, lr=1e-2)
    assert len(losses) == 4 and losses[-1] < losses[0]
    after = weights(m)
    assert {k for k in after if not torch.equal(after[k], before[k])} == {'gnn.item.weight', 'project.weight'}      # trained, and scaled to it; the rest waits
    t = trainer(m).fit(1); held = weights(m)
    assert torch.equal(held['gnn.item.weight'], after['gnn.item.weight']) and id(m.gnn.item.weight) not in {id(p) for p in t.params}
    assert all(not torch.equal(held[k], after[k]) for k in held if 'gnn' not in k and k != 'blocks.0.att.qkv.bias')
    m.freeze_graph(False); trainer(m).fit(1)
    assert not torch.equal(weights(m)['gnn.item.weight'], held['gnn.item.weight'])

def test_no_epochs_only_freeze():
    m = hybrid(gnn='gat', gnn_layers=1); before = weights(m)
    assert pretrain_graph(m, Loader(DATA.train, 12, 8), 0) == [] and same(before, weights(m))
    assert not any(p.requires_grad for p in m.gnn.parameters()) and all(p.requires_grad for k, p in m.named_parameters() if not k.startswith('gnn'))

def test_the_first_stage_is_a_function_of_its_seed():
    def go(seed, noise=0): m = hybrid(); torch.rand(noise); pretrain_graph(m, Loader(DATA.train, 12, 8), 1, seed=seed); return weights(m)
    assert same(go(0), go(0, 3)) and not same(go(0), go(1))

@pytest.mark.parametrize('make', [lambda: SASRec(N, **SMALL), lambda: graphrec()], ids=['sasrec', 'graph'])
def test_only_a_hybrid_has_two_stages(make):
    with pytest.raises(ValueError, match='no graph that could be pre-trained'): pretrain_graph(make(), Loader(DATA.train, 12, 8), 1)

# ---- the graph alone ----

@pytest.mark.parametrize('decay', [.01, .7, 1.])
@torch.no_grad()
def test_a_history_is_a_decayed_mean(decay):
    m, b = graphrec(decay=decay, max_len=200), rows([200, 3, 1])
    G, h = m.table(), m(b).h
    for r, t in ((0, 199), (0, 0), (0, 50), (1, 2), (2, 0)):
        w = decay ** np.arange(t, -1, -1.)
        x = (torch.tensor(w / w.sum(), dtype=torch.float32)[:, None] * G[b.items[r, :t + 1]]).sum(0)
        assert torch.allclose(h[r, t], m.read(x), atol=1e-5)

def test_the_item_table_of_the_graph_alone_learns():
    m = graphrec(); before = m.table().detach().clone(); steps(m, 1, loss='bpr')
    assert (m.table()[1:] != before[1:]).any(1).float().mean() > .9 and not m.table()[0].any()

def test_a_shared_encoder_is_one_encoder():
    h = hybrid(); alone = GraphRec(N, h.gnn, 16, 12)
    assert alone.gnn is h.gnn and torch.equal(alone.table(), h.gnn())

# ---- names and mistakes ----

def test_names_of_the_requirement():
    from seqrec_nb.models import HybridSASRecGNN as public
    assert public is HybridSASRecGNN
    m = public(N, GRAPH, fusion_type='discrete', fixed_alpha=.4, L_short=5, L_long=30, gnn_layers=1, n_heads=4, n_blocks=1, d_model=32, max_len=20)
    assert m.fusion.L_short == 5 and m.gnn.n_layers == 1 and m.blocks[0].att.n_heads == 4
    assert {*VARIANTS, 'hybridsasrecgnn', 'lightgcn', 'graphrec'} <= set(MODELS)

def test_importing_the_models_registers_them():
    import subprocess, sys
    from conftest import ROOT
    code = "import seqrec_nb.models as m; assert {'hybrid_fixed', 'hybrid_gat', 'lightgcn'} <= set(m.MODELS), sorted(m.MODELS)"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True); assert done.returncode == 0, done.stderr[-300:]

@pytest.mark.parametrize('name', VARIANTS)
def test_variants_are_what_they_are_called(name):
    m = create(name, N, graph=GRAPH, **SMALL); kind = name.split('_')[1]
    assert type(m) is HybridSASRecGNN and type(m.gnn) is (GAT if kind == 'gat' else LightGCN)
    assert type(m.fusion) is FUSIONS['discrete' if kind == 'gat' else kind]
    own = settings(model_class(name)); assert {*settings(SASRec), 'fusion_type', 'gnn', 'graph_window', 'alpha_reg'} <= set(own)
    assert own['gnn' if kind == 'gat' else 'fusion_type'] == kind
    assert create(name, N, graph=GRAPH, fixed_alpha=.25, **SMALL).alpha(torch.tensor([7])).item() == (.25 if kind == 'fixed' else pytest.approx(m.alpha(torch.tensor([7])).item()))

@pytest.mark.parametrize('name', [*VARIANTS, 'hybridsasrecgnn', 'lightgcn', 'graphrec'])
def test_a_missing_graph_is_said(name):
    for given in ({}, dict(graph=None), dict(graph=DATA), dict(graph='graph.npz')):
        with pytest.raises(TypeError, match=r'item_graph\(data\)'): create(name, N, **given)

@pytest.mark.parametrize('n_items', [N - 5, N + 5])
@pytest.mark.parametrize('name', ['hybrid_fixed', 'hybrid_gat', 'lightgcn'])
def test_a_graph_of_another_catalogue_is_refused(name, n_items):
    with pytest.raises(ValueError, match=f'{n_items}.*{N}|{N}.*{n_items}'): create(name, N, graph=item_graph(histories(n_items=n_items)))

def test_an_encoder_of_another_catalogue_is_refused():
    with pytest.raises(ValueError): GraphRec(N + 5, hybrid().gnn, 16, 12)

@pytest.mark.parametrize('kw, message', [
    (dict(fusion_type='discret'), "did you mean 'discrete'"), (dict(fusion_level='imput'), "did you mean 'input'"), (dict(score_with='fuse'), "did you mean 'fused'"),
    (dict(alpha_per='users'), "did you mean 'user'"), (dict(gnn='lightgnc'), "did you mean 'lightgcn'"), (dict(gnn_norm='weight'), "did you mean 'weighted'"),
    (dict(gnn='gat', gnn_norm='weight'), "did you mean 'weighted'"), (dict(gnn_layers=-1), 'negative'), (dict(fusion_type='fixed', fixed_alpha=1.5), r'\[0, 1\]'), (dict(L_short=50, L_long=10), 'L_short'),
    (dict(fusion_type='learnable', alpha_min=.9, alpha_max=.1), 'alpha_min'), (dict(fusion_type='fixed', monotone=True), 'monotone')], ids=str)
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): HybridSASRecGNN(N, GRAPH, **{**SMALL, **kw})

def test_impossible_settings_of_the_graph_alone():
    for decay in (0., -1., 1.1):
        with pytest.raises(ValueError, match='decay'): GraphRec(N, GRAPH, decay=decay)
    with pytest.raises(ValueError, match="did you mean 'lightgcn'"): GraphRec(N, GRAPH, gnn='lightgnc')

def test_unknown_names_are_corrected():
    with pytest.raises(ValueError, match="did you mean 'hybrid_fixed'"): create('hybrid_fixd', N, graph=GRAPH)
    with pytest.raises(TypeError, match="did you mean 'fixed_alpha'"): create('hybrid_fixed', N, graph=GRAPH, fixd_alpha=.3)
    with pytest.raises(TypeError, match="did you mean 'gnn_layers'"): Experiment(model='hybrid_gat', gnn_layer=3)

def test_a_graph_from_data():
    for window in (2, 5):
        m = HybridSASRecGNN.from_data(DATA, graph_window=window, graph_min_count=1, **SMALL)
        g = item_graph(DATA, window, 1); assert m.n_items == N and len(m.gnn.graph.value) == 2 * g.n_edges + N
    m = model_class('hybrid_gat').from_data(DATA, graph_min_count=10**6, **SMALL)
    assert type(m.gnn) is GAT and len(m.gnn.graph.value) == N
    assert type(model_class('lightgcn').from_data(DATA)) is GraphRec

def test_one_alpha_for_a_user_needs_prefixes():
    m = hybrid(alpha_per='user'); assert not m.causal
    with pytest.raises(ValueError, match='not causal'): trainer(m)
    e = Experiment(model='hybrid_fixed', alpha_per='user', **SMALL)
    assert loaders(e, DATA, build(e, DATA), 'cpu')[0].samples == 'prefix'
    e = Experiment(model='hybrid_fixed', **SMALL); assert loaders(e, DATA, build(e, DATA), 'cpu')[0].samples == 'all'

# ---- experiments ----

@pytest.fixture(scope='module')
def csv(tmp_path_factory):
    "Histories of all three groups, for experiments"
    rng = np.random.default_rng(0); n = rng.integers([5, 13, 56], [10, 30, 70], (12, 3)).ravel()
    items = np.concatenate([(rng.integers(30) + rng.choice([1, 1, 2, 7], k).cumsum()) % 30 for k in n])
    path = tmp_path_factory.mktemp('data')/'walks.csv'
    pd.DataFrame(dict(user=np.repeat(np.arange(36), n), item=items, timestamp=np.arange(n.sum()) + 10**9)).to_csv(path, index=False)
    return path

TINY = dict(d_model=8, n_blocks=1, n_heads=1, max_len=10, batch_size=16, lr=1e-2, dropout=.1, epochs=2, patience=0, threads=1)

def experiment(csv, model='hybrid_piecewise', **kw): return Experiment(model=model, data=csv, **{**TINY, **kw})

def results(out):
    "What must be equal in equal runs: everything but clocks and the machine"
    m = read_metrics(out)
    for k in ('timings', 'environment', 'commit', 'name'): m.pop(k)
    del m['checkpoint']['mtime'], m['checkpoint']['sha256']
    return m

@pytest.fixture(scope='module')
def made(csv, tmp_path_factory): return run(experiment(csv, pretrain=2), tmp_path_factory.mktemp('made')/'run')

def test_settings_of_an_experiment():
    e = Experiment(model='hybrid_gat', graph_window=5, fixed_alpha=.3)
    assert e.args['gnn'] == 'gat' and e.args['graph_window'] == 5 and e.args['gnn_layers'] == 2 and e.source['graph_window'] == 'given'
    assert Experiment(**e.to_dict()) == e and json.loads(json.dumps(e.to_dict())) == e.to_dict() and 'graph' not in e.args
    with pytest.raises(TypeError, match='graph_window'): Experiment(model='sasrec', graph_window=3)

@pytest.mark.parametrize('name', ['hybrid_gat', 'hybrid_fixed', 'lightgcn'])
def test_flags_of_the_command_line(name, capsys):
    assert main(['train', name, '--help']) == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert '--graph-window INT items that count as close' in text and '--graph-min-count INT windows that two items' in text
    assert '--pretrain INT' in text and '--hard INT' in text
    for flag in ('--gnn-layers INT', '--fixed-alpha FLOAT')[:1 if name == 'lightgcn' else 2]:
        assert not text.split(flag)[1].strip().startswith('(default'), f'{flag} has no comment'

def test_every_argument_of_the_hybrids_has_a_comment():
    from seqrec_nb.arguments import model_flags
    assert [f'{name} {f.name}' for name in ('hybridsasrecgnn', 'hybrid_gat', 'lightgcn', 'graphrec') for f in model_flags(name) if not f.help] == []

def test_trained_now_and_tested_later(csv, made, tmp_path):
    out = tmp_path/'run'; e = lambda: experiment(csv, pretrain=2)
    run(e(), out, test=False)
    assert (out/'best/model.safetensors').exists() and not (out/'metrics.json').exists() and not (out/'ranks.npz').exists()
    history = (out/'history.jsonl').read_text(); run(e(), out)
    assert results(out) == results(made) and (out/'history.jsonl').read_text() == history

def test_stopped_early_and_tested_later(csv, tmp_path):
    e = lambda: experiment(csv, 'hybrid_fixed', epochs=30, patience=1, lr=.3)
    run(e(), tmp_path/'a'); run(e(), tmp_path/'b', test=False); run(e(), tmp_path/'b')
    assert results(tmp_path/'a') == results(tmp_path/'b') and read_metrics(tmp_path/'a')['stopped'] == 'early stopping'

def test_a_run_of_two_stages(csv, made):
    text = (made/'run.log').read_text(); assert 'the graph alone, 2 epochs of BPR' in text
    from safetensors.numpy import load_file
    best, last = (load_file(made/f'{k}/model.safetensors')['gnn.item.weight'] for k in ('best', 'last'))
    assert np.array_equal(best, last) and not [k for k in load_file(made/'last/optim.safetensors') if k.startswith('gnn')]

class Kill(Callback):
    def __init__(self, step): self.step = step
    def on_step_end(self, t):
        if t.step == self.step: t.stop = 'killed'

@pytest.mark.parametrize('kw', [dict(pretrain=2), dict(threads=2)], ids=str)
def test_an_interrupted_run_ends_the_same(kw, csv, made, tmp_path):
    threads = torch.get_num_threads()
    try:
        whole = made if 'pretrain' in kw else run(experiment(csv, **kw), tmp_path/'whole')
        with pytest.raises(Interrupted): run(experiment(csv, **kw), tmp_path/'run', callbacks=[Kill(4)])
        run(experiment(csv, **kw), tmp_path/'run', 'must')
    finally: torch.set_num_threads(threads)
    assert results(tmp_path/'run') == results(whole)
    assert (tmp_path/'run/last/model.safetensors').read_bytes() == (whole/'last/model.safetensors').read_bytes()

@pytest.mark.parametrize('model, given, message', [('sasrec', dict(pretrain=1), 'no graph'), ('lightgcn', dict(pretrain=1), 'no graph'), ('markov', dict(pretrain=1), 'does not apply'),
                                                   ('hybrid_fixed', dict(hard=5), 'no negatives'), ('hybrid_fixed', dict(hard=5, loss='ss'), 'pool of 5'),
                                                   ('hybrid_fixed', dict(samples='all', alpha_per='user'), 'not causal')], ids=str)
def test_what_does_not_go_together_is_refused(model, given, message, csv, tmp_path):
    both = {k: v for k, v in TINY.items() if k in settings(model_class(model)) or k not in settings(SASRec)} | dict(max_len=10)
    with pytest.raises(ValueError, match=message): run(Experiment(model=model, data=csv, **{**both, **given}), tmp_path/'run')
    assert not (tmp_path/'run/metrics.json').exists()

KEYS = {'mean', 'std', 'min', 'max', 'count'}

def check_alpha(m):
    a = m['alpha_stats']; assert set(a) == set(m['grouped_metrics'])
    for g, s in a.items():
        assert set(s) == KEYS and s['count'] == m['grouped_metrics'][g]['count'] > 0
        assert 0 <= s['min'] <= s['mean'] + 1e-9 and s['mean'] <= s['max'] + 1e-9 <= 1 + 1e-9 and s['std'] >= 0
    parts = [s for g, s in a.items() if g != 'overall']
    assert sum(s['count'] for s in parts) == a['overall']['count']
    assert sum(s['count'] * s['mean'] for s in parts) / a['overall']['count'] == pytest.approx(a['overall']['mean'])
    return a

def test_statistics_of_alpha(made, csv, tmp_path):
    a = check_alpha(read_metrics(made)); assert a['short']['mean'] < a['medium']['mean'] < a['long']['mean']
    a = check_alpha(read_metrics(run(experiment(csv, 'hybrid_fixed', fixed_alpha=.3, epochs=1), tmp_path/'fixed')))
    assert all(s['std'] == 0 and s['mean'] == pytest.approx(.3) and s['min'] == s['max'] for s in a.values())
    a = check_alpha(read_metrics(run(experiment(csv, 'hybrid_discrete', alpha_per='user', epochs=1), tmp_path/'discrete')))
    assert [a[g]['mean'] for g in ('short', 'medium', 'long')] == pytest.approx([.3, .5, .7])

def test_models_without_alpha_have_no_statistics(csv, tmp_path):
    e = Experiment(model='lightgcn', data=csv, d_model=8, max_len=10, batch_size=16, epochs=1, loss='bpr', hard=5, negatives=2, threads=1)
    assert 'alpha_stats' not in read_metrics(run(e, tmp_path/'run'))

# ---- what the lead added last ----

def test_two_stage_leaves_both_tables_equally_long():
    "Stage one moves the graph's vectors: without a new scale the stated α would be another"
    reseed(0, 'weights'); m, loader = HybridSASRecGNN(N, GRAPH, **SMALL), Loader(DATA.train, 12, 8)
    pretrain_graph(m, loader, 3, lr=2e-2)
    E, G = m.table().detach().chunk(2, 1)
    assert torch.isclose(E.norm(), G.norm())
    at = m.project.weight.clone(); pretrain_graph(m, loader, 0)          # a run that continues: the checkpoint knows better
    assert torch.equal(m.project.weight, at)

def test_a_hybrid_has_the_recipe_of_sasrec():
    plain, mixed = Experiment(model='sasrec', data='ml-100k'), Experiment(model='hybrid_gat', data='ml-100k')
    assert mixed.source['dropout'] == 'recipe' and mixed.args['dropout'] == plain.args['dropout'] and mixed.batch_size == plain.batch_size
    assert Experiment(model='gru4rec', data='ml-100k').source['dropout'] == 'default'

@pytest.mark.parametrize('name', ['hybrid_fixed', 'hybrid_gat', 'lightgcn'])
def test_threads_do_not_change_what_is_learned(name, monkeypatch):
    "The fused Adam of a CPU misreads a gradient that is a view into a larger one; without the copy the weights part"
    from seqrec_nb.data import Loader, synthetic
    from seqrec_nb.core import reseed
    from seqrec_nb.losses import CrossEntropy
    from seqrec_nb.models.base import model_class
    from seqrec_nb.train import Trainer
    data = synthetic(n_users=60, n_items=120, seed=0)
    def trained(threads):
        reseed(0, 'threads')
        m = model_class(name).from_data(data, max_len=20, d_model=8, graph_min_count=1)
        Trainer(m, Loader(data.train, max_len=20, batch_size=16), CrossEntropy(), lr=.01, threads=threads).fit(2)
        return torch.cat([p.detach().flatten() for p in m.parameters()])
    one = trained(1)
    assert (one - trained(2)).abs().max() < 2e-3
    if name != 'hybrid_fixed': return
    monkeypatch.setattr(torch.Tensor, 'contiguous', lambda x, **kw: x)        # the twin
    assert (one - trained(2)).abs().max() > .02
