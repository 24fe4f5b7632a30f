"The item graph counts training windows and nothing else; LightGCN and GAT equal their formulas."
from dataclasses import replace
from itertools import combinations
import subprocess, sys
import numpy as np, pytest, torch
import torch.nn.functional as F
from conftest import ROOT, needs_data
from seqrec_nb.blocks.graph import GAT, Adjacency, LightGCN, softmax_rows, spmm
from seqrec_nb.data.graph import ItemGraph, item_graph
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import Split, leave_one_out, load

def sequences(histories, n_items):
    offsets = np.r_[0, np.cumsum([len(h) for h in histories])].astype(np.int64)
    items = np.array([i for h in histories for i in h], np.int32)
    return Sequences(items, offsets, None, np.arange(len(histories)), np.arange(1, n_items + 1))

def all_training(histories, n_items=9):
    "A data set whose training histories are exactly these"
    seqs = sequences(histories, n_items)
    train = Split(seqs, 'train', np.arange(len(histories)), seqs.offsets[:-1], seqs.offsets[1:])
    return replace(leave_one_out(seqs), train=train)

def by_loop(histories, window):
    count = {}
    for h in histories:
        for k in range(len(h) - window + 1):
            for i, j in combinations(h[k:k + window], 2):
                if i != j: count[min(i, j), max(i, j)] = count.get((min(i, j), max(i, j)), 0) + 1
    return count

def counts(g): return {(int(i), int(j)): int(c) for (i, j), c in zip(g.edges.T, g.count)}
def same(a, b): return np.array_equal(a.edges, b.edges) and np.array_equal(a.count, b.count)

def random_graph(n_items=11, share=.3, seed=0, most=9):
    draw = np.random.default_rng(seed)
    i, j = np.nonzero(np.triu(draw.random((n_items, n_items)) < share, 1))
    return ItemGraph(n_items, np.stack([i, j]) + 1, draw.integers(1, most, len(i)), 3, 1, len(i))

def no_edges(n_items=4):
    return ItemGraph(n_items, np.zeros((2, 0), np.int64), np.zeros(0, np.int64), 3, 1, 0)

def dense(g, *args, **kw):
    index, value = g.adjacency(*args, **kw)
    return torch.zeros(g.n_items + 1, g.n_items + 1).index_put_(tuple(index), value)

# ---- counting ----

TOY = {(1, 2): 1, (1, 3): 1, (2, 3): 2, (2, 4): 1, (3, 4): 1}

def test_toy_sequence():
    assert counts(item_graph(all_training([[1, 2, 3, 4]]), min_count=1)) == TOY

def test_histories_shorter_than_the_window_give_nothing():
    g = item_graph(all_training([[1, 2], [3]]), min_count=1)
    assert g.n_edges == g.n_pairs == 0 and g.edges.shape == (2, 0) and len(g.isolated) == 9
    assert item_graph(all_training([[1, 2], [3]]), window=2, min_count=1).n_edges == 1

def test_min_count_filters_after_counting():
    data = all_training([[1, 2, 3, 4]] * 3)
    g = item_graph(data, min_count=4)
    assert counts(g) == {(2, 3): 6} and g.n_pairs == len(TOY)
    assert g.isolated.tolist() == [1, 4, 5, 6, 7, 8, 9] and g.degree.tolist() == [0, 0, 1, 1] + [0] * 6

def test_repeats_make_no_self_pairs():
    g = item_graph(all_training([[1, 1, 1, 2, 1]]), min_count=1)
    assert counts(g) == by_loop([[1, 1, 1, 2, 1]], 3) and (g.edges[0] < g.edges[1]).all()
    assert item_graph(all_training([[5] * 8]), min_count=1).n_edges == 0

@pytest.mark.parametrize('window', [2, 3, 4, 5])
def test_counts_equal_a_loop(window):
    draw = np.random.default_rng(window)
    for trial in range(20):
        histories = [draw.integers(1, 10, n).tolist() for n in draw.integers(1, 15, 12)]
        for least in (1, 3):
            want = {k: c for k, c in by_loop(histories, window).items() if c >= least}
            g = item_graph(all_training(histories), window, least)
            assert counts(g) == want and list(counts(g)) == sorted(want)

def test_flat_lays_histories_end_to_end():
    data = synthetic(n_users=30, seed=1)
    for split in (data.train, data.test, data.train.take([4, 2]), data.train.take([])):
        item, row = split.flat()
        assert item.dtype == np.int64 and row.tolist() == np.repeat(range(len(split)), split.length).tolist()
        assert item.tolist() == [i for r in range(len(split)) for i in split.history(r).tolist()]

def test_only_training_rows_count():
    data, spoiled = (synthetic(n_users=200, seed=3) for _ in range(2))
    for split in (spoiled.valid, spoiled.test):
        split.seqs.items[split.stop] = split.target % data.n_items + 1
    assert (data.test.target != spoiled.test.target).all()
    assert same(item_graph(data), item_graph(spoiled))

def test_order_of_users_does_not_matter():
    data = synthetic(n_users=200, seed=3)
    moved = replace(data, train=data.train.take(np.random.default_rng(0).permutation(len(data.train))))
    assert same(item_graph(data), item_graph(moved)) and same(item_graph(data), item_graph(data))

def test_wrong_arguments():
    data = all_training([[1, 2, 3, 4]])
    for wrong in (data.test, data.train, data.seqs, None, [[1, 2, 3]]):
        with pytest.raises(TypeError, match='load'): item_graph(wrong)
    with pytest.raises(ValueError, match='window'): item_graph(data, window=1)
    with pytest.raises(ValueError, match='min_count'): item_graph(data, min_count=0)
    with pytest.raises(ValueError, match="mean 'weighted'"): item_graph(data).adjacency('weigthed')
    with pytest.raises(ValueError, match="mean 'count'"): item_graph(data).adjacency(weights='counts')

# ---- the matrix ----

@pytest.mark.parametrize('norm', ['weighted', 'legacy', 'none'])
@pytest.mark.parametrize('weights', ['count', 'log', 'one'])
@pytest.mark.parametrize('loops', [True, False])
def test_adjacency_equals_the_formula(norm, weights, loops):
    g = random_graph(share=.2)
    A = torch.zeros(12, 12, dtype=torch.double)
    for (i, j), c in counts(g).items():
        A[i, j] = A[j, i] = {'count': c, 'log': np.log1p(c), 'one': 1}[weights]
    if loops: A += torch.diag(torch.tensor([0.] + [1.] * 11))
    d = {'weighted': A.sum(1), 'legacy': (A > 0).sum(1).double(), 'none': torch.ones(12)}[norm].clamp_min(1e-30)
    index, value = g.adjacency(norm, weights, loops)
    assert index.dtype == torch.int64 and value.dtype == torch.float32
    assert (index[0] * 12 + index[1]).diff().gt(0).all() and index.min() >= 1
    assert torch.allclose(dense(g, norm, weights, loops).double(), A / (d[:, None] * d).sqrt(), atol=1e-6)

@pytest.mark.parametrize('weights', ['count', 'log', 'one'])
@pytest.mark.parametrize('loops', [True, False])
def test_weighted_norm_has_radius_one(weights, loops):
    for seed in range(5):
        A = dense(random_graph(30, .1, seed, most=500), weights=weights, loops=loops)
        assert torch.equal(A, A.T) and torch.linalg.eigvalsh(A.double()).abs().max() <= 1 + 1e-6

def test_constant_is_preserved_on_a_regular_graph():
    ring = ItemGraph(6, np.array([[1, 1, 2, 3, 4, 5], [2, 6, 3, 4, 5, 6]]), np.full(6, 4), 3, 1, 6)
    for loops in (True, False):
        model = LightGCN(ring, d_model=3, layers=3, loops=loops)
        with torch.no_grad(): model.item.weight[1:] = torch.tensor([1., -2., .5])
        assert torch.allclose(model(), model.item.weight, atol=1e-6)

# ---- ML-1M ----

@pytest.fixture(scope='module')
def ml1m(): return item_graph(load('ml-1m', 'P-seed'))

@needs_data
def test_ml1m_graph(ml1m):
    assert (ml1m.n_items, ml1m.n_pairs, ml1m.n_edges) == (3533, 426_617, 74_170)
    assert ml1m.count.max() == 1265 and ml1m.count.min() == 5 and np.median(ml1m.count) == 8
    assert len(ml1m.isolated) == 1219 and ml1m.degree.max() == 518
    assert ml1m.adjacency()[0].shape == (2, 2 * 74_170 + 3533)

@needs_data
def test_ml1m_radius(ml1m):
    sparse = pytest.importorskip('scipy.sparse')
    from scipy.sparse.linalg import eigsh
    def radius(norm):
        (row, col), value = ml1m.adjacency(norm)
        A = sparse.csr_matrix((value.double().numpy(), (row.numpy(), col.numpy())), (3534, 3534))
        return abs(eigsh(A, k=1, return_eigenvectors=False)).max()
    assert .999 < radius('weighted') <= 1 + 1e-6
    assert abs(radius('legacy') - 17.22) < .01

# ---- the product ----

def entries(g, seed=0):
    a = Adjacency(g, 'none')
    draw = torch.Generator().manual_seed(seed)
    value = torch.rand(len(a.col), generator=draw, dtype=torch.double, requires_grad=True)
    x = torch.randn(g.n_items + 1, 5, generator=draw, dtype=torch.double, requires_grad=True)
    return a, value, x

def test_spmm_equals_dense():
    a, value, x = entries(random_graph())
    A = torch.zeros(12, 12, dtype=torch.double).index_put((a.row, a.col.long()), value)
    got, want = spmm(a.ptr, a.col, value, x, a.twin), A @ x
    assert torch.allclose(got, want)
    for p, q in zip(*(torch.autograd.grad(y.sin().sum(), (value, x)) for y in (got, want))):
        assert torch.allclose(p, q)

def test_spmm_gradcheck():
    a, value, x = entries(random_graph(6))
    assert torch.autograd.gradcheck(lambda v, x: spmm(a.ptr, a.col, v, x, a.twin), (value, x))
    ours = Adjacency(random_graph(6)).double()
    assert torch.autograd.gradcheck(ours, (x,))                         # symmetric: its own transpose

def test_spmm_takes_views_and_other_dtypes():
    a, value, x = entries(random_graph())
    wide = torch.stack([x, x], -1)
    want = spmm(a.ptr, a.col, value, x, a.twin)
    assert torch.equal(spmm(a.ptr, a.col, value, wide[..., 1], a.twin), want)
    got = spmm(a.ptr, a.col, a.value, x.bfloat16())
    assert got.dtype == torch.float32 and torch.allclose(got, a(x.bfloat16().float()))
    grad, = torch.autograd.grad(a(x).sum(), x)                          # an expanded gradient
    assert torch.allclose(grad, a(torch.ones_like(x)).to(grad))

def test_product_passes_torchs_own_checks():
    a, value, x = entries(random_graph(6))
    torch.library.opcheck(torch.ops.seqrec_nb.spmm, (a.ptr, a.col, value, value[a.twin].detach(), x),
                         test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))

def test_autocast_leaves_the_product_alone():
    model = LightGCN(random_graph(), d_model=8)
    with torch.autocast('cpu', torch.bfloat16): half = model()
    assert half.dtype == torch.float32 and torch.equal(half, model())
    gat = GAT(random_graph(), d_model=8, init_std=1.)
    with torch.autocast('cpu', torch.bfloat16): half = gat()
    assert half.dtype == torch.float32 and (half - gat()).abs().max() < .1

# ---- LightGCN ----

@pytest.mark.parametrize('layers', [0, 1, 2, 3, 4])
@pytest.mark.parametrize('norm', ['weighted', 'legacy'])
def test_lightgcn_equals_dense(layers, norm):
    g = random_graph()
    model, A = LightGCN(g, d_model=8, layers=layers, norm=norm, init_std=1.), dense(g, norm)
    x = steps = model.item.weight
    for _ in range(layers): x = A @ x; steps = steps + x
    assert torch.allclose(model(), steps / (layers + 1), atol=1e-5)
    if not layers: assert torch.equal(model(), model.item.weight)

def test_isolated_items():
    g = ItemGraph(4, np.array([[1], [2]]), np.array([7]), 3, 1, 1)
    for layers in (1, 2, 4):
        model = LightGCN(g, d_model=8, layers=layers)
        assert torch.allclose(model()[3:], model.item.weight[3:], rtol=1e-6)
        alone = LightGCN(g, d_model=8, layers=layers, loops=False)
        assert torch.allclose(alone()[3:], alone.item.weight[3:] / (layers + 1))
    for model in (LightGCN(no_edges(), loops=False), LightGCN(no_edges()), GAT(no_edges())):
        model().square().sum().backward()
        assert model().isfinite().all() and model.item.weight.grad[1:].isfinite().all()

def relabelled(g, name):
    "The same graph after item i has become item name[i]"
    i, j = np.sort(name[g.edges], axis=0)
    order = np.lexsort((j, i))
    return replace(g, edges=np.stack([i, j])[:, order], count=g.count[order])

@pytest.mark.parametrize('make', [LightGCN, GAT])
def test_relabelling_items_relabels_the_answer(make):
    g = random_graph()
    name = np.r_[0, np.random.default_rng(1).permutation(11) + 1]
    a, b = make(g, d_model=8, init_std=1.), make(relabelled(g, name), d_model=8)
    b.load_state_dict(a.state_dict())
    with torch.no_grad(): b.item.weight[name] = a.item.weight
    assert torch.allclose(b()[name], a(), atol=1e-5)

@pytest.mark.parametrize('make', [LightGCN, GAT])
def test_padding_row_is_never_read_or_trained(make):
    model = make(random_graph(), d_model=8, init_std=.5)
    want = model().detach()
    optimiser = torch.optim.Adam(model.parameters(), lr=.1, weight_decay=.1)
    for _ in range(10):
        optimiser.zero_grad(); (model() - 1).square().sum().backward(); optimiser.step()
    assert not model.item.weight[0].any() and not model()[0].any() and not torch.equal(model(), want)
    good = model().detach()
    with torch.no_grad(): model.item.weight[0] = torch.nan
    assert torch.equal(model(), good)

@pytest.mark.parametrize('make', [LightGCN, GAT])
def test_state_dict_with_and_without_the_graph(make):
    g = random_graph()
    without, kept = make(g, d_model=4), make(g, d_model=4, keep_graph=True)
    inside = {k for k in kept.state_dict() if k.startswith('graph.')}
    assert {'graph.ptr', 'graph.col', 'graph.value'} <= inside and inside.isdisjoint(without.state_dict())
    again = make(g, d_model=4, keep_graph=True)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again(), kept())
    assert make(g, d_model=4).load_state_dict(without.state_dict()).missing_keys == []
    assert {n for n, _ in kept.named_parameters()}.isdisjoint(inside)
    assert kept.to('meta').graph.value.device.type == 'meta'

@pytest.mark.parametrize('make', [LightGCN, GAT])
def test_wrong_models(make):
    with pytest.raises(ValueError, match='layers'): make(random_graph(), layers=-1)
    for wrong in (None, 'graph', np.zeros((2, 3))):
        with pytest.raises(TypeError, match='item_graph'): make(wrong)

def test_initial_vectors():
    w = LightGCN(no_edges(2000), init_std=.02).item.weight
    assert not w[0].any() and w.abs().max() <= .04 and .015 < w[1:].std() < .02

# ---- GAT ----

def naive(f, x, g):
    "One layer, item by item"
    y = torch.zeros_like(x)
    for i in range(1, len(x)):
        at = g.row == i
        h, own = f.lin(x[g.col[at].long()]).unflatten(-1, (f.heads, -1)), f.lin(x[i]).view(f.heads, -1)
        e = (h * f.source).sum(-1) + (own * f.dest).sum(-1)
        if f.edge is not None: e = e + g.value[at].log1p()[:, None] * f.edge
        y[i] = (F.leaky_relu(e, .2).softmax(0)[..., None] * h).sum(0).mean(0) + f.bias
    return y

def stirred(g, **kw):
    model = GAT(g, d_model=8, init_std=1., **kw)
    with torch.no_grad():
        for f in model.layers:
            f.bias.normal_()
            if f.edge is not None: f.edge.normal_()
    return model

@pytest.mark.parametrize('layers', [0, 1, 2, 3])
@pytest.mark.parametrize('edge_weights', [True, False])
def test_gat_equals_a_loop(layers, edge_weights):
    model = stirred(random_graph(), layers=layers, heads=3, edge_weights=edge_weights)
    x = model.table()
    for k, f in enumerate(model.layers): x = naive(f, F.relu(x) if k else x, model.graph)
    got = model()
    assert torch.allclose(got, x, atol=1e-5) and not got[0].any() and (got < 0).any()
    params = list(model.parameters())
    for p, q in zip(*(torch.autograd.grad(y.sin().sum(), params) for y in (got, x))):
        assert torch.allclose(p, q, atol=1e-4)

def test_attention_is_a_distribution_over_neighbours():
    g = replace(random_graph(12), n_items=14)                           # 13 and 14 have no edge
    model = stirred(g, heads=2)
    for layer in (0, 1):
        who, w = model.attention(layer)
        total = torch.zeros(15, 2).index_add(0, who[0], w)
        assert torch.allclose(total[1:], torch.ones(14, 2)) and not total[0].any() and (w > 0).all()
        assert torch.equal(w[who[0] >= 13], torch.ones(2, 2)) and who[:, who[0] == 13].tolist() == [[13], [13]]
    assert model()[13:].isfinite().all()

def test_softmax_is_stable():
    e = torch.tensor([[1000.], [999.], [-1000.], [-1000.]], requires_grad=True)
    w = softmax_rows(e, torch.tensor([1, 1, 2, 2]), 4)
    assert torch.allclose(w[:, 0], torch.tensor([.7311, .2689, .5, .5]), atol=1e-4)
    assert torch.autograd.grad(w.square().sum(), e)[0].isfinite().all()

def test_edge_weights_are_used_and_learn():
    g = random_graph(most=100)
    a, b = stirred(g), stirred(replace(g, count=g.count + 50))
    b.load_state_dict(a.state_dict())
    assert not torch.allclose(a(), b())
    fresh = GAT(g, d_model=8, init_std=1.)
    fresh()[1].sum().backward()
    assert all(f.edge.grad.abs().sum() > 0 for f in fresh.layers)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fresh.parameters())

def test_gat_equals_torch_geometric():
    nn = pytest.importorskip('torch_geometric.nn')
    model = stirred(random_graph(), layers=1, heads=3)
    f, g = model.layers[0], model.graph
    theirs = nn.GATConv(8, 8, heads=3, concat=False, edge_dim=1, add_self_loops=False)
    with torch.no_grad():
        theirs.lin.weight.copy_(f.lin.weight); theirs.bias.copy_(f.bias)
        theirs.att_src.copy_(f.source[None]); theirs.att_dst.copy_(f.dest[None])
        theirs.lin_edge.weight.fill_(1 / 8); theirs.att_edge.copy_(f.edge[None, :, None].expand(1, 3, 8))
    edges = torch.stack([g.col.long(), g.row])
    got = theirs(model.table(), edges, g.value.log1p()[:, None])
    assert torch.allclose(got[1:], model()[1:], atol=1e-5)

# ---- compiling ----

@pytest.mark.parametrize('make', [LightGCN, GAT])
def test_models_compile_as_one_graph(make):
    "Traced whole, forward and backward; what a backend then makes of it is torch's business"
    model = make(random_graph(), d_model=8, init_std=1.)
    fast = torch.compile(model, fullgraph=True, backend='aot_eager')
    params = list(model.parameters())
    assert torch.allclose(fast(), model(), atol=1e-6)
    grads = (torch.autograd.grad(y.sin().sum(), params) for y in (fast(), model()))
    for p, q in zip(*grads): assert torch.allclose(p, q, atol=1e-5)

def test_training_prints_no_warning():
    code = ('import numpy as np; from seqrec_nb.data.graph import ItemGraph; from seqrec_nb.blocks.graph import GAT;'
            'GAT(ItemGraph(3, np.array([[1], [2]]), np.array([5]), 3, 1, 1))().sum().backward()')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, '')
