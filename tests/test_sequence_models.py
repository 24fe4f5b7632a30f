"GRU4Rec, Caser and BERT4Rec: what each reads, and the cloze samples that the last is trained on."
from functools import cache
import numpy as np, pytest, torch
from torch.nn.utils.rnn import pack_padded_sequence
from seqrec_nb.core import Batch, reseed
from seqrec_nb.data.loader import EvalLoader, Loader, hide
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out
from seqrec_nb.evaluate import rankings
from seqrec_nb.losses import BCE, BPR, CrossEntropy, SampledSoftmax
from seqrec_nb.metrics import hr
from seqrec_nb.models.base import check_model, create, settings
from seqrec_nb.models.baselines import Popularity
from seqrec_nb.models.bert4rec import BERT4Rec
from seqrec_nb.models.caser import Caser
from seqrec_nb.models.gru4rec import GRU4Rec
from seqrec_nb.train import Callback, Trainer

synthetic = cache(synthetic)
SMALL = dict(d_model=16, max_len=12)
VARIANTS = [('gru4rec', kw) for kw in ({}, dict(n_layers=2), dict(d_hidden=24), dict(max_len=3))] + \
           [('caser', kw) for kw in ({}, dict(L_caser=2), dict(L_caser=9, nh=3, nv=1), dict(max_len=3))] + \
           [('bert4rec', kw) for kw in ({}, dict(norm='post'), dict(norm='query'), dict(n_heads=1, n_blocks=1),
                                        dict(attn_dropout=.3), dict(d_inner=16, activation='relu'), dict(max_len=3))]

@pytest.mark.parametrize('name, kw', VARIANTS, ids=str)
def test_every_variant_passes_every_check(name, kw): check_model(name, **{**SMALL, **kw})

ZOO = [GRU4Rec, Caser, BERT4Rec]

def rows(lengths, n_items=60, width=None, seed=1):
    g = torch.Generator().manual_seed(seed); n = torch.tensor(lengths)
    items = torch.randint(1, n_items + 1, (len(n), width or max(lengths)), generator=g)
    return Batch(items * (torch.arange(items.shape[1]) < n[:, None]), length=n)

@pytest.mark.parametrize('cls', ZOO)
@torch.no_grad()
def test_every_length_of_a_long_window(cls):
    "The answer depends on the last item, and neither on the padding nor on the rest of the batch; an empty row is finite"
    reseed(0); m = cls(60, d_model=16, max_len=50, init_std=.3).eval(); b = rows(list(range(1, 51)))
    s, other = m.scores(b), b.items.clone()
    other[torch.arange(50), b.last] = other[torch.arange(50), b.last] % 60 + 1
    assert (m.scores(Batch(other)) != s).any(1).all()
    for n in (1, 2, 24, 25, 26, 49, 50): assert torch.allclose(m.scores(Batch(b.items[n - 1:n, :n])), s[n - 1:n], atol=1e-4)
    assert m.scores(Batch(torch.zeros(2, 5, dtype=torch.long)))[:, 1:].isfinite().all()
    with pytest.raises(ValueError, match='longer than max_len'): m(rows([51]))

@torch.no_grad()
def test_packing_rows_padded_on_the_left_hears_nothing():
    "The published bug, for contrast: up to half a window the state has read padding alone; ours hears every item"
    reseed(0); m = GRU4Rec(60, d_model=16, init_std=.3).eval()
    def packed(items): return m.layers[0](pack_padded_sequence(m.item(torch.cat([items.new_zeros(50 - len(items)), items])[None]), [len(items)], batch_first=True))[1]
    for n in (1, 10, 25):
        items = torch.arange(1, n + 1)
        for k in range(n):
            other = items.where(torch.arange(n) != k, items + 30)
            assert torch.equal(packed(items), packed(other)) and not torch.equal(m.scores(Batch(items[None])), m.scores(Batch(other[None])))
    assert not torch.equal(packed(torch.arange(1, 27)), packed(torch.arange(2, 28)))

@pytest.mark.parametrize('w', [1, 3, 5])
@torch.no_grad()
def test_caser_reads_exactly_the_last_items(w):
    reseed(0); m = Caser(60, d_model=16, L_caser=w, init_std=.3).eval(); items = torch.arange(1, 31)[None]
    def moved(k): other = items.clone(); other[0, -1 - k] += 30; return not torch.equal(m.scores(Batch(items)), m.scores(Batch(other)))
    assert [moved(k) for k in range(30)] == [True] * w + [False] * (30 - w)

# ---- cloze samples ----

def histories(users=60, longest=23, seed=0):
    "Every item of the table is another, so that an item says where it stands; users of 1, 2 and 3 rows among them, also at the end"
    rng = np.random.default_rng(seed); n = rng.integers(1, longest, users); n[:3] = 1, 2, 3; n[-1] = 2
    return leave_one_out(Sequences(np.arange(1, n.sum() + 1, dtype=np.int32), np.r_[0, n.cumsum()], np.arange(n.sum()) * 10, np.arange(users), np.arange(n.sum())))

def batches(loader, epoch=0): return [b for step in loader.steps(epoch) for b in step]

@pytest.mark.parametrize('L', [2, 5, 22, 40])
@pytest.mark.parametrize('parts', [None, 1])
def test_cloze_rows_are_the_histories_with_holes(L, parts):
    d = histories(); loader = Loader(d.train, L, 7, 'cloze', parts=parts, time=True, seed=3); found = []
    for epoch in range(3):
        for b in batches(loader, epoch):
            gone = b.target > 0
            assert (b.items[gone] == d.n_items + 1).all() and (b.items[~gone] <= d.n_items).all() and not (gone & ~b.mask).any()
            assert b.n_targets == gone.sum() and gone.any(1).all() and (b.mask & ~gone).any(1).all()
            whole = torch.where(gone, b.target, b.items)
            for r in range(len(b)):
                h, n = d.train.history(int(b.row[r])), int(b.mask[r].sum()); found.append(int(b.row[r]))
                assert whole[r, :n].tolist() == h[-L:].tolist() and b.length[r] == len(h)      # the last training item included, nothing behind it
                assert b.time[r, :n].tolist() == [(i - 1) * 10 for i in h[-L:]] and b.time[r, n:].eq(b.time[r, n - 1]).all()
    assert sorted(found) == sorted([r for r in range(len(d.train)) if d.train.length[r] > 1] * 3) and len(loader) * 3 == len(found)

def test_cloze_shows_no_validation_or_test_item():
    d = histories(); held = {*d.valid.target.tolist(), *d.test.target.tolist()}
    for L in (5, 40):
        for b in batches(Loader(d.train, L, 9, 'cloze', mask_last=.5)): assert not held & {*b.items.flatten().tolist(), *b.target.flatten().tolist()}

def test_a_seed_an_epoch_and_a_place_decide():
    d = histories(); make = lambda seed=0: Loader(d.train, 9, 6, 'cloze', seed=seed)
    same = lambda x, y: len(x) == len(y) and all(torch.equal(a.items, b.items) and torch.equal(a.target, b.target) for a, b in zip(x, y))
    one, two = make(), make(); batches(two, 7); np.random.rand(3); torch.rand(3)
    assert same(batches(one, 1), batches(two, 1)) and not same(batches(one, 1), batches(one, 2)) and not same(batches(one, 1), batches(make(1), 1))
    whole = list(make().steps(2))
    for start in (0, 1, len(whole) - 1, len(whole)):
        rest = list(make().steps(2, start))
        assert len(rest) == len(whole) - start and all(map(same, rest, whole[start:]))

@pytest.mark.parametrize('share, last', [(.2, .1), (.5, 0.), (.1, .5), (.9, 0.)])
def test_share_and_last_only_rows(share, last):
    n, width = np.tile(np.arange(2, 42), 200), 45
    hidden = hide(n, width, share, last, np.random.default_rng(0)); count = hidden.sum(1)
    assert not hidden[np.arange(width) >= n[:, None]].any()
    want = np.clip(np.round(share * n), 1, n - 1)
    only = (count == 1) & (want > 1)
    assert hidden[only, n[only] - 1].all() and ((count == want) | only).all()
    several = (want > 1).sum()
    assert abs(only.sum() / several - last) < 4 * (last * (1 - last) / several) ** .5 + 1e-9
    rest = hidden[(n == 41) & ~only][:, :41].mean(0)                              # uniform over the positions
    assert abs(rest - rest.mean()).max() < 5 * (rest.mean() * (1 - rest.mean()) / 150) ** .5
    loader = Loader(histories().train, 40, 60, 'cloze', mask_share=share, mask_last=last)
    mean = np.mean([sum(b.n_targets for b in batches(loader, e)) for e in range(60)])
    assert abs(mean / loader.n_targets - 1) < .05

def test_bad_cloze_settings():
    d = histories()
    for kw in (dict(mask_share=0.), dict(mask_share=1.), dict(mask_last=1.5), dict(max_len=1)):
        with pytest.raises(ValueError, match='mask_share'): Loader(d.train, samples='cloze', **kw)
    with pytest.raises(ValueError, match='own ends'): Loader(d.train, samples='cloze', window='every')
    with pytest.raises(ValueError, match="did you mean 'cloze'"): Loader(d.train, samples='close')

# ---- BERT4Rec ----

def bert(seed=0, n_items=60, **kw): reseed(seed); return BERT4Rec(n_items, **{**SMALL, 'max_len': 20, 'init_std': .3, 'dropout': 0., **kw})

@torch.no_grad()
def test_a_hidden_item_is_read_from_both_sides_and_its_own_value_never():
    m = bert().eval(); items = torch.tensor([[5, 9, 61, 7, 8, 0, 0]]); target = torch.tensor([[0, 0, 30, 0, 0, 0, 0]])
    h = m(Batch(items, target)).h
    for k in (0, 1, 3, 4): other = items.clone(); other[0, k] += 1; assert not torch.allclose(m(Batch(other, target)).h[0, 2], h[0, 2], atol=1e-3)
    assert torch.equal(m(Batch(items, target * 2)).h, h) and torch.allclose(m(Batch(items[:, :5], target[:, :5])).h, h[:, :5], atol=1e-5)

@torch.no_grad()
def test_the_question_is_a_mask_behind_the_last_item():
    m, b = bert().eval(), rows([1, 4, 19, 20, 7])
    h = b.at_last(m(b).h)
    for r, n in enumerate(b.length.tolist()[:3]):
        cloze = Batch(torch.cat([b.items[r:r + 1, :n], torch.tensor([[61]])], 1), torch.tensor([[0] * n + [3]]))
        assert torch.allclose(m(cloze).h[0, n], h[r], atol=1e-5)
    for target in (torch.ones(5, dtype=torch.long), torch.ones_like(b.items)): assert torch.equal(m.scores(Batch(b.items, target)), m.scores(b))
    assert not torch.allclose(m.scores(rows([20])), m.scores(Batch(rows([20]).items[:, 1:])), atol=1e-3)     # the oldest of a full window counts

def test_the_mask_is_a_parameter_and_no_item():
    m, data = bert(), synthetic(n_users=100, n_items=60, longest=55)
    assert m.item.weight.shape == (61, 16) and m.mask.shape == (16,) and settings(BERT4Rec)['activation'] == 'gelu'
    b = next(Loader(data.train, 20, 32, 'cloze').steps(0))[0]
    for loss in (CrossEntropy(), SampledSoftmax(8), BCE(2), BPR(2, exclude='window')):
        m.zero_grad(); loss(m, m(b), b).backward()
        assert m.mask.grad.any() and all(p.grad.isfinite().all() for p in m.parameters())
    assert (m.predict(rows([5])) <= 60).all()

def test_the_trainer_refuses_what_would_show_the_answers():
    data = synthetic(n_users=100, n_items=60, longest=55)
    with pytest.raises(ValueError, match='not causal'): Trainer(bert(), Loader(data.train, 20), CrossEntropy())
    with pytest.raises(ValueError, match='(?i)cloze|mask'): Trainer(create('gru4rec', 60), Loader(data.train, 20, samples='cloze'), CrossEntropy())

class StopAt(Callback):
    def __init__(self, step): self.step = step
    def on_step_end(self, t): t.stop = 'enough' if t.step == self.step else None

def test_a_resumed_run_ends_in_the_same_bits():
    data = synthetic(n_users=120, n_items=60, longest=55)
    make = lambda seed=0, *c: Trainer(bert(seed, dropout=.2), Loader(data.train, 20, 30, 'cloze', seed=1), CrossEntropy(), seed=1, callbacks=c, threads=2)
    whole, first, second = make().fit(3), make(0, StopAt(6)).fit(3), make(5)
    second.load(first.tensors(), first.state()); second.fit(3)
    assert all(map(torch.equal, whole.params, second.params)) and whole.record['loss'] == second.record['loss']

@pytest.mark.parametrize('cls', ZOO)
def test_trained_for_seconds_it_beats_popularity(cls):
    data = synthetic(n_users=600, n_items=60, longest=55, long_gaps=0., graph=(0., 0., 0.), seed=2); reseed(0)
    kw = dict(n_blocks=1, n_heads=1) if cls is BERT4Rec else {}
    m = cls(data.n_items, d_model=32, max_len=20, dropout=.1, init_std=.1, **kw)
    Trainer(m, Loader(data.train, 20, 32, 'cloze' if m.cloze else 'all'), CrossEntropy(), lr=5e-3, threads=1).fit(12 if m.cloze else 4)
    value = [hr(rankings(x.eval(), EvalLoader(data.test, 20))['masked']).mean() for x in (m, Popularity.from_data(data))]
    assert value[0] > 1.3 * value[1] and value[0] < data.best(10)['HR@10'][0] + .05
