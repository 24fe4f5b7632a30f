"Large logs and large catalogues: bounded memory of the ingest, a pre-flight estimate that refuses in time, streamed evaluation."
import math, sys, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from conftest import ROOT
from seqrec_nb import gradients, losses, memory
from seqrec_nb.core import Batch, Out, reseed
from seqrec_nb.data import EvalLoader, Loader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out
from seqrec_nb.evaluate import counts
from seqrec_nb.losses import BCE, BPR, GBCE, CrossEntropy, SampledSoftmax
from seqrec_nb.memory import NotEnoughMemory, Step, check_memory, estimate_memory, largest_step
from seqrec_nb.models import MODELS, SASRec
from seqrec_nb.models import base
from seqrec_nb.models.base import SeqModel, model_class
from seqrec_nb.parallel import World
from seqrec_nb.train import NonFinite, Trainer, update

sys.path.insert(0, str(ROOT/'benchmarks'))
import scale

class Naive:
    "All scores at once"
    def __call__(self, model, out, b): return F.cross_entropy(out.h.flatten(0, 1) @ out.E.T, b.target.flatten())

class Largest(TorchDispatchMode):
    "The largest storage, in bytes, of all tensors that operations give"
    def __init__(self): super().__init__(); self.bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out

def large(V, users=60, n=12, seed=0):
    rng = np.random.default_rng(seed)
    items = rng.integers(1, V + 1, users * n).astype(np.int32)
    return leave_one_out(Sequences(items, np.arange(users + 1) * n, None, np.arange(users), np.arange(V)))

# 20 million interactions, in small

@pytest.fixture(scope='module')
def whole_way(): return scale.rows(400_000, steps=4)

def test_the_ingest_stays_within_its_share_of_two_gib(whole_way):
    "A child with an address space of 6 GiB: of 2 GiB for 20 M rows, what the imports leave is 92 bytes a row"
    a = whole_way['ingest']
    imports = a['import']['peak_gib']
    assert a['rows'] == 400_000 and 0 < imports < .6
    share = (scale.LIMIT - imports) / 20e6 * a['rows']
    for k in ('read', 'split'): assert a[k]['peak_gib'] - imports < share + 1 / 16, (k, a[k])

def test_the_limit_on_the_address_space_bites():
    "Twin: a child that may not have the memory does fail, so the limit above is no ornament"
    with pytest.raises(SystemExit, match='catalogue|baselines'): scale.child('baselines', 1_000_000, 2000, gib=.5)

def test_training_arrays_are_no_larger_than_what_was_read(whole_way):
    "All windows of an epoch, the table, times and splits beside user, item and time of the log"
    b, a = whole_way['training'], whole_way['ingest']
    assert a['raw_bytes'] == 16 * a['rows']
    assert .5 < b['arrays']['ratio'] <= 1.2 and b['epoch']['steps'] > 4 and math.isfinite(b['epoch']['loss'])

def test_what_is_held_is_counted_once():
    "Twin of the ratio: a copy counts, a view and a tensor on the same memory do not"
    class Holder: pass
    o = Holder(); o.a = np.zeros(1000, np.int64); o.view = o.a[10:]; o.tensor = torch.as_tensor(o.a)
    assert scale.held(o) == 8000
    o.copy = o.a.copy()
    assert scale.held(o, o) == 16000

def test_windows_are_kept_small():
    data = synthetic(300, seed=0)
    x = Loader(data.train, 50, 64, 'prefix')
    assert (x.row.dtype, x.hi.dtype, x.n.dtype) == (np.int32, np.int32, np.int8)
    b = next(x.steps(0))[0]
    assert {t.dtype for t in (b.items, b.target, b.user, b.length, b.row)} == {torch.int64}
    assert Loader(data.train, 200).n.dtype == np.int16 and Loader(data.train, 40_000).n.dtype == np.int32

# a catalogue too large for all scores

@pytest.fixture(scope='module')
def huge():
    with torch.device('meta'): return SASRec(5_000_000, d_model=64, max_len=50)

STEP = Step(rows=128, width=50, cells=6400, targets=6400, parts=4)

def test_five_million_items_on_the_meta_device(huge):
    e = {type(l).__name__: estimate_memory(huge, STEP, l, threads=1) for l in (Naive(), CrossEntropy(), SampledSoftmax(), GBCE(), BCE(), BPR())}
    assert all(x.held == 0 and x.device == 'meta' for x in e.values())
    assert e['Naive'].total > 3 * 4 * 6400 * 5_000_001
    assert all(e[k].total < 16 * 2**30 for k in e if k != 'Naive')
    W = sum(p.numel() * 4 for p in huge.parameters())
    assert e['GBCE'].always['weights'] == W and e['GBCE'].always["Adam's moments"] == 2 * W

def test_what_cannot_fit_is_refused_before_the_first_step(huge):
    with pytest.raises(NotEnoughMemory, match=r"299\.\d GiB too little(?s:.*)loss='ss'(?s:.*)which fits") as e:
        check_memory(huge, STEP, Naive(), available=64 * 2**30, threads=1)
    assert isinstance(e.value, MemoryError) and 'scores of all items' in str(e.value)
    for loss in (CrossEntropy(), SampledSoftmax(), GBCE()): check_memory(huge, STEP, loss, available=64 * 2**30, threads=1)

def test_without_the_check_the_allocation_is_attempted(huge):
    "Twin: on the meta device the step runs on and makes the (N,V) scores; sampled, nothing is larger than the table"
    i = torch.ones(128, 50, dtype=torch.long, device='meta')
    with Largest() as most: Naive()(huge, huge(Batch(i, i)), Batch(i, i))
    assert most.bytes >= 4 * 6400 * 5_000_001
    with Largest() as most:
        out = huge(Batch(i, i)); h = out.h.flatten(0, 1)
        huge.score(h, out.E, None, torch.ones(256, dtype=torch.long, device='meta')).logsumexp(1).sum().backward()
    assert most.bytes <= 4 * 5_000_001 * 64

def test_weights_alone_may_be_too_much(huge):
    with pytest.raises(NotEnoughMemory, match=r'alone need 4\.\d GiB: a smaller d_model'):
        check_memory(huge, STEP, SampledSoftmax(), available=2**30, threads=1)

def test_a_fake_limit_stops_a_training_and_only_it(monkeypatch):
    data = synthetic(200, seed=0); loader = Loader(data.train, 20, 64)
    def train():
        reseed(0, 'scale'); model = SASRec(data.n_items, 8, 1, 1, 20)
        loss = SampledSoftmax(8)
        memory.check_memory(model, loader, loss)
        t = Trainer(model, loader, loss); t.fit(1); return t.step
    assert train() == loader.n_steps
    monkeypatch.setattr(memory, 'available_memory', lambda device: 2**20)
    with pytest.raises(NotEnoughMemory, match='1.0 MiB are free'): train()
    monkeypatch.setattr(memory, 'check_memory', lambda *a: None)            # twin: nothing else would have stopped it
    assert train() == loader.n_steps

def test_nearly_enough_is_a_warning(huge):
    e = estimate_memory(huge, STEP, SampledSoftmax(), threads=1)
    run = lambda share: check_memory(huge, STEP, SampledSoftmax(), available=int(share * e.needed), threads=1)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert run(1.01).total == e.total
    with pytest.warns(UserWarning, match='is tried nevertheless'): assert run(.9).total == e.total
    with pytest.raises(NotEnoughMemory): run(.7)

def test_a_remedy_is_what_it_says(huge):
    "The smaller batch that the error proposes passes the check with the memory that it names"
    step, free = Step(512, 200, 512 * 200, 512 * 200, 4), 16 * 2**30
    lines = memory.remedies(huge, step, Naive(), 200 * 2**30, threads=1)
    assert lines[0].endswith('which fits') and len(lines) == 1
    lines = memory.remedies(huge, step, SampledSoftmax(20_000), free, threads=1)
    assert 'does not fit' in lines[0] and lines[-1].endswith('which fits')
    rows = int(lines[-1].split()[3])
    check_memory(huge, Step(rows, 200, rows * 200, rows * 200, 4), SampledSoftmax(20_000), available=free, threads=1)

# the parts of an estimate against what is really there

def test_weights_gradients_and_moments_are_exact():
    data = synthetic(200, seed=0); model, loader = SASRec(data.n_items, 8, 1, 1, 20), Loader(data.train, 20, 64)
    e = estimate_memory(model, loader, CrossEntropy(), threads=1)
    t = Trainer(model, loader, CrossEntropy(), threads=1); t.fit(1)
    size = lambda x: sum(v.numel() * v.element_size() for v in x)
    assert e.always['weights'] == size(model.parameters())
    assert e.phases['a backward pass']['gradients'] == size(p.grad for p in model.parameters())
    assert e.always["Adam's moments"] == size(s[k] for s in t.opt.state.values() for k in ('exp_avg', 'exp_avg_sq'))
    assert e.held == e.always['weights'] + e.always['data']

@pytest.mark.parametrize('name', sorted(k for k, f in MODELS.items() if getattr(f, 'trainable', True) and k != 'gru4rec'))
def test_activations_bound_what_a_batch_keeps(name):
    "Every trainable model: what two rows keep says what a batch keeps, and leaves no trace in the model"
    data = synthetic(60, seed=0); make = model_class(name)
    model = make.from_data(data, max_len=16); model.eval()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    E, made, kept, largest = memory.activations(model, 16)
    assert torch.equal(rng, torch.get_rng_state()) and not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), E]}
    i = torch.randint(1, data.n_items, (8, 16)); r = torch.arange(8)
    model.train()
    _, real, _ = memory._kept(lambda: model(Batch(i, i, r, r + 16, torch.arange(17).expand(8, -1), r), E), own | {i.untyped_storage()._cdata})
    assert abs(8 * kept - real) < .1 * real and 0 < largest <= kept

def test_the_largest_step_bounds_every_step():
    data = synthetic(500, seed=1)
    for samples, parts in (('all', 4), ('all', 8), ('prefix', 4), ('cloze', 4)):
        loader = Loader(data.train, 50, 64, samples, parts=parts); s = largest_step(loader)
        for step in loader.steps(0):
            assert sum(b.items.numel() for b in step) <= s.cells and sum(len(b) for b in step) <= s.rows
            assert sum(b.n_targets for b in step) <= s.targets and max(b.items.shape[1] for b in step) <= s.width
        assert s.cells < 64 * 50 or samples != 'all'                         # tighter than all rows at full width

# the slices of the cross-entropy

def test_slices_are_small_for_large_catalogues_and_today_s_are_as_they_were(monkeypatch):
    assert {CrossEntropy().rows(V) for V in (2, 3417, 57_290, 131_072)} == {512} and CrossEntropy(7).rows(50) == 7
    for V in (131_073, 10**6, 10**7, 10**9): assert CrossEntropy().rows(V) * V <= 2**26 or CrossEntropy().rows(V) == 1
    reseed(0, 'slices'); V, N = 401, 90
    h, E, t = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True), torch.randint(1, V, (N,))
    model, b = SASRec(V - 1, 8, 1, 1, 5), Batch(t[:, None], t[:, None])
    def run():
        with Largest() as most: loss = CrossEntropy()(model, Out(h[:, None], E), b)
        return loss.item(), *torch.autograd.grad(loss, (h, E)), most.bytes
    whole = run()
    monkeypatch.setattr(losses, 'SLICE', 4000)                               # nine rows
    small = run()
    assert whole[3] == 4 * N * (V - 1) and small[3] <= 4 * 4000              # twin: without the bound, all N at once
    want = F.cross_entropy(h @ E[1:].T, t - 1)
    for got in (whole, small):
        assert math.isclose(got[0], want.item(), rel_tol=1e-5)
        for g, w in zip(got[1:3], torch.autograd.grad(want, (h, E), retain_graph=True)): assert torch.allclose(g, w, atol=1e-6)

# a large catalogue's gradients are collected sparsely

class Unit(SASRec):
    "A table that is computed from the weights"
    def table(self): return F.normalize(self.item.weight, dim=1)

def one_step(monkeypatch, limit, name='sasrec', loss='ss', threads=1, pieces=0, precision='fp32', scaled=False, clip=None, world=None, steps=2):
    "Gradients, weights and losses of two steps, and which sums of gradients were sparse"
    monkeypatch.setattr(base, 'LARGE', limit)
    sparse, added = [], gradients.added
    monkeypatch.setattr(gradients, 'added', lambda g: (sparse.append(r.is_sparse) if (r := added(g)) is not None else 0, r)[1])
    reseed(0, 'sparse'); data = synthetic(80, seed=0); make = Unit if name == 'unit' else model_class(name)
    kw = dict(d_model=8, max_len=16, dropout=0.)
    model = make.from_data(data, **{k: v for k, v in kw.items() if k in base.settings(make)})
    loader = Loader(data.train, 16, 32, samples='cloze' if model.cloze else 'all' if model.causal else 'prefix')
    t = Trainer(model, loader, losses.make_loss(loss), threads=threads, precision=precision, clip=clip)
    t.pieces = pieces
    if scaled: t.scaler = torch.amp.GradScaler('cpu', 2.**8)
    value, found = [], []
    for parts in [*loader.steps(0)][:steps]:
        l, _ = gradients.backward(t, parts, world); found += [p.grad.clone() for p in t.params if p.grad is not None]
        assert all(p.grad.layout == torch.strided and (p.grad.is_contiguous() or limit > 10) for p in t.params if p.grad is not None)
        update(t, l); t.step += 1; value.append(l)
    monkeypatch.setattr(gradients, 'added', added)
    return [*found, *(p.detach() for p in model.parameters()), *value], sparse

WAYS = [dict(loss=l, threads=n, pieces=k) for l in ('ce', 'ss', 'bpr') for n, k in ((1, 0), (2, 0), (1, 2))]
WAYS += [dict(name=m, threads=n) for m in ('unit', 'gru4rec', 'bert4rec', 'lightgcn', 'hybrid_fixed') for n in (1, 2)]
WAYS += [dict(clip=.01), dict(scaled=True, clip=1.), dict(threads=2, scaled=True), dict(name='hybrid_fixed', loss='ce', pieces=1)]

@pytest.mark.parametrize('way', WAYS, ids=lambda w: '-'.join(map(str, w.values())))
def test_sparse_sums_are_the_dense_ones(monkeypatch, way):
    pieces = way.get('pieces', 0)                                            # one piece of a part draws what the part does
    dense, none = one_step(monkeypatch, 2**17, **{**way, 'threads': 1, 'pieces': pieces * (pieces > 1)})
    got, some = one_step(monkeypatch, 10, **way)
    assert not any(none) and (any(some) or way.get('loss') == 'ce' or way.get('name') in ('bert4rec', 'hybrid_fixed'))
    assert len(got) == len(dense) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, dense))

def test_sparse_sums_in_bf16(monkeypatch):
    for threads in (1, 2):
        dense, got = (one_step(monkeypatch, limit, precision='bf16', threads=threads, steps=1)[0] for limit in (2**17, 10))
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(got[:20], dense)) and torch.allclose(got[-1], dense[-1])

def test_processes_add_up_what_was_sparse(monkeypatch):
    "Two pretended processes with equal shares: every exchange gets a dense tensor in one piece, and doubles it"
    sent = []
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda g: sent.append((g.layout, g.is_contiguous())) or g.mul_(2))
    monkeypatch.setattr(World, 'hand', lambda self, sizes: [*range(len(sizes))])
    alone, _ = one_step(monkeypatch, 10, steps=1)
    two, _ = one_step(monkeypatch, 10, steps=1, world=World(0, 2))
    grads = len(alone) // 2                                                  # gradients, as many weights, a loss
    assert set(sent) == {(torch.strided, True)} and torch.equal(two[-1], 2 * alone[-1])
    assert all(torch.equal(b, 2 * a) for a, b in zip(alone[:grads], two))

def test_a_nan_is_blamed_alike(monkeypatch):
    said = []
    for limit in (2**17, 10):
        monkeypatch.setattr(base, 'LARGE', limit); reseed(0, 'blame'); data = synthetic(80, seed=0)
        model = SASRec(data.n_items, 8, 1, 1, 16); model.item.weight.data[3] = torch.nan
        t = Trainer(model, Loader(data.train, 16, 32), SampledSoftmax(8), threads=1)
        with pytest.raises(NonFinite) as e: t.fit(1)
        said.append(str(e.value))
    assert said[0] == said[1] and 'item.weight held such a value' in said[0]

def test_a_loop_of_one_s_own_sees_dense_gradients(monkeypatch):
    "Above the limit, too: Adam refuses sparse ones, as it does for a copy of the table (twin)"
    monkeypatch.setattr(base, 'LARGE', 10)
    model, b = SASRec(50, 8, 1, 1, 10), Batch(torch.randint(1, 51, (4, 10)))
    def step(E, opt):
        opt.zero_grad(); out = model(b, E); model.score(out.h, out.E, b, b.items[..., None]).sum().backward(); opt.step()
    step(None, torch.optim.Adam(model.parameters()))
    assert not model.item.weight.grad.is_sparse
    copy = model.table().detach().requires_grad_()
    with pytest.raises(RuntimeError, match='sparse'): step(copy, torch.optim.Adam([copy]))

@pytest.mark.parametrize('limit', [10, 2**17])
def test_compiled_models(monkeypatch, limit):
    class Last(SeqModel):
        def body(self, x, b): return x
    monkeypatch.setattr(base, 'LARGE', limit); torch._dynamo.reset()
    model, b = Last(50, 8), Batch(torch.randint(1, 51, (4, 10)))
    fast, got = torch.compile(model, fullgraph=True, backend='eager'), []
    for E in (model.table(), model.table().detach().requires_grad_()):
        for f in (model, fast):
            g, = torch.autograd.grad(f(b, E).h.square().sum(), E)
            assert g.is_sparse == (limit == 10 and not isinstance(E, torch.nn.Parameter)); got.append(g.to_dense())
    assert all(torch.allclose(g, got[0], atol=1e-6) for g in got)

class Tables(TorchDispatchMode):
    "How many dense tensors of the size of the table are made in a step"
    def __init__(self, n): super().__init__(); self.n, self.made = n, 0
    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {})); old = {id(x) for x in tree_leaves((args, kw))}
        self.made += sum(isinstance(x, torch.Tensor) and x.layout == torch.strided and x.numel() == self.n and id(x) not in old
                         and x._base is None for x in tree_leaves(out))
        return out

def test_a_large_table_has_one_gradient_of_its_size(monkeypatch):
    "Twin: with the limit where it is not reached, every lookup makes one"
    made, V = [], 3001
    data = large(V - 1); loader = Loader(data.train, 12, 32)
    for limit in (2**17, 10):
        monkeypatch.setattr(base, 'LARGE', limit); reseed(0, 'tables')
        t = Trainer(SASRec(V - 1, 8, 1, 1, 12), loader, SampledSoftmax(8), threads=1)
        parts = next(loader.steps(0))
        with Tables(V * 8) as count: gradients.backward(t, parts)
        made.append(count.made)
    assert made[0] >= 3 * len(parts) and made[1] <= 3, made

# full ranking in a stream

@pytest.mark.parametrize('name', ['sasrec', 'popularity', 'markov', 'cooccurrence'])
def test_ranking_never_holds_users_times_items(name):
    V, users, bound = 60_000, 150, 2**19                                     # eight rows at a time
    data = large(V, users)
    model = SASRec(V, 4, 1, 1, 12) if name == 'sasrec' else model_class(name).from_data(data)
    with Largest() as most: got = counts(model, EvalLoader(data.test, 12), max_scores=bound)
    one = 4 if name == 'sasrec' else 8
    assert most.bytes <= one * bound
    with Largest() as most: want = counts(model, EvalLoader(data.test, 12), max_scores=2**40)
    assert most.bytes >= users * V * (1 if name == 'popularity' else one)     # twin: without the bound, all at once
    assert np.array_equal(got, want)

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_broken_scores_are_found_at_any_place(value):
    "In any place, in either precision; and finite scores whose sum overflows are no error"
    from seqrec_nb.evaluate import unusable
    for dtype in (torch.float32, torch.float64):
        s = torch.full((70, 70), torch.finfo(dtype).max, dtype=dtype); t = torch.ones(70, dtype=torch.long)
        assert not unusable(s, t).any()
        s[range(1, 70), range(1, 70)] = value; s[0, 0] = value
        assert unusable(s, t).tolist() == [False] + [True] * 69

def test_counted_models_grow_with_the_log_not_with_items_squared():
    V, data = 1_000_000, large(1_000_000, 200)
    model = model_class('cooccurrence').from_data(data)
    pairs = model.lags * data.n_interactions
    assert len(model.next) == len(model.weight) <= pairs and sum(b.nbytes for b in model.buffers()) <= 16 * pairs + 16 * (V + 2)

# what is free

def test_control_groups(tmp_path):
    new = tmp_path/'a'/'b'; new.mkdir(parents=True); own = tmp_path/'own'
    (new/'memory.max').write_text('max\n'); (new/'memory.current').write_text('5\n')
    own.write_text('0::/a/b\n')
    assert memory.group_memory(tmp_path, own) is None
    (tmp_path/'a'/'memory.max').write_text('100\n'); (tmp_path/'a'/'memory.current').write_text('30\n')
    assert memory.group_memory(tmp_path, own) == 70                          # a limit higher up counts
    (new/'memory.max').write_text('20\n')
    assert memory.group_memory(tmp_path, own) == 15                          # the lowest counts
    (new/'memory.stat').write_text('anon 1\nactive_file 2\ninactive_file 1\nfile 4\n')
    assert memory.group_memory(tmp_path, own) == 18                          # what only remembers files can be had
    (new/'memory.stat').unlink()
    old = tmp_path/'memory'; old.mkdir(); own.write_text('3:cpu,memory:/docker/xyz\n4:cpu:/a\n')
    (old/'memory.limit_in_bytes').write_text('50'); (old/'memory.usage_in_bytes').write_text('60')
    assert memory.group_memory(tmp_path, own) == 0                           # inside a container the group is the root
    assert memory.group_memory(tmp_path, tmp_path/'none') is None

def test_the_lowest_limit_counts(monkeypatch, tmp_path):
    (tmp_path/'m').write_text('MemTotal: 9 kB\nMemAvailable:  7 kB\n')
    assert memory.machine_memory(tmp_path/'m') == 7168 and memory.machine_memory(tmp_path/'none') is None
    for values, lowest in (((5, 3, 9), 3), ((None, 3, None), 3), ((None,) * 3, None)):
        for name, v in zip(('machine_memory', 'group_memory', 'address_space'), values): monkeypatch.setattr(memory, name, lambda v=v: v)
        assert memory.available_memory('cpu') == lowest

def test_the_limit_on_the_address_space_is_seen(monkeypatch):
    import resource
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert memory.address_space() is None
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (2**50, 2**50))
    assert 2**50 - 2**44 < memory.address_space() < 2**50
