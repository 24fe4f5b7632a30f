"Counted models: counts by hand, no leak, the interface of trained models, and the published floors to 1e-4."
import numpy as np, pytest, torch
from safetensors.torch import load, save
from conftest import needs_data
from seqrec_nb.core import Batch
from seqrec_nb.data.loader import EvalLoader
from seqrec_nb.data.planted import synthetic
from seqrec_nb.data.splits import Split, leave_one_out
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.evaluate import ranks, rankings
from seqrec_nb.metrics import averages, summary
from seqrec_nb.models.base import MODELS, create
from seqrec_nb.models.baselines import Cooccurrence, Markov, Popularity, pairs

ALL = [Popularity, Markov, Cooccurrence]

def table(*histories, n_items=6):
    "A data set of these histories, in which the last two items of each are validation and test"
    n = np.array([len(h) for h in histories])
    return leave_one_out(Sequences(np.concatenate(histories).astype(np.int32), np.r_[0, n.cumsum()], None,
                                   np.arange(len(n)), np.arange(1, n_items + 1)))

@pytest.fixture(scope='module')
def data(): return synthetic(300, seed=0)

def slow_counts(split, V, lag):
    C = np.zeros((V, V))
    for r in range(len(split)):
        h = split.history(r)
        for a, b in zip(h, h[lag:]): C[a, b] += 1
    return C

@pytest.mark.parametrize('lag', [1, 2, 5])
def test_pairs_against_a_double_loop(data, lag):
    V = data.n_items + 1
    key, n = pairs(*data.train.flat(), V, lag)
    C = np.zeros(V * V); C[key] = n
    assert np.array_equal(C.reshape(V, V), slow_counts(data.train, V, lag))

def test_rows_need_not_lie_end_to_end():
    d = table([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    part = Split(d.seqs, 'train', np.array([1, 0]), np.array([6, 1]), np.array([8, 4]))
    item, row = part.flat()
    assert item.tolist() == [4, 3, 2, 3, 4] and row.tolist() == [0, 0, 1, 1, 1]

def test_by_hand():
    d = table([1, 2, 3, 6, 6], [1, 2, 6, 6], [2, 1, 2, 6, 6])      # training: 1 2 3, 1 2, 2 1 2
    b = Batch(torch.tensor([[3, 1], [2, 0]]), length=torch.tensor([2, 1]))
    pop = Popularity.from_data(d).scores(b)[0, 1:]
    assert pop.tolist() == [3, 4, 1, 0, 0, 0]
    s = Markov.from_data(d).scores(b)
    for row, want in zip(s, ([0, 3, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0])):
        assert torch.allclose(row[1:] - 1e-9 * pop, torch.tensor(want).double(), rtol=0, atol=1e-15)

def slow_cooccurrence(d, h, V):
    pop = np.bincount(d.train.flat()[0], minlength=V)
    C = sum(slow_counts(d.train, V, lag) / lag for lag in range(1, 6)) / np.sqrt(np.maximum(pop, 1))
    return sum(.7 ** a * C[i] for a, i in enumerate(h[::-1][:10]))

def test_cooccurrence_against_the_formula(data):
    V, m = data.n_items + 1, Cooccurrence.from_data(data)
    b = next(iter(EvalLoader(data.test, batch_size=40)))
    s = m.scores(b)
    for q in (0, 17, 39):
        slow = slow_cooccurrence(data, data.test.history(b.row[q]), V)
        assert np.allclose(s[q], slow, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('cls', ALL)
def test_interface(cls, data):
    m = cls.from_data(data)
    assert MODELS[cls.__name__.lower()] is cls and isinstance(create(cls.__name__, 9), cls)
    assert not m.trainable and not list(m.parameters()) and m.table().shape == (data.n_items + 1, 0)
    b = next(iter(EvalLoader(data.test, batch_size=8)))
    assert m.scores(b).shape == (8, data.n_items + 1) and m.scores(b).dtype == torch.float64
    assert m.predict(b, k=5).shape == (8, 5)

@pytest.mark.parametrize('cls', ALL)
def test_padding_and_batch_do_not_matter(cls, data):
    m = cls.from_data(data)
    b = next(iter(EvalLoader(data.test, batch_size=64)))
    wide = Batch(torch.nn.functional.pad(b.items, (0, 7)), length=b.length)
    assert torch.equal(m.scores(b)[:, 1:], m.scores(wide)[:, 1:])
    n = int((b.items[40] > 0).sum())
    alone = Batch(b.items[40:41, :n], length=b.length[40:41])
    assert torch.equal(m.scores(alone)[0, 1:], m.scores(b)[40, 1:])

@pytest.mark.parametrize('cls', ALL)
def test_an_empty_history_is_no_error(cls, data):
    nothing = Batch(torch.zeros(1, 3, dtype=torch.long), length=torch.zeros(1, dtype=torch.long))
    assert cls.from_data(data).scores(nothing)[:, 1:].isfinite().all()

@pytest.mark.parametrize('cls', ALL)
def test_saved_and_loaded(cls, data):
    m, fresh = cls.from_data(data), create(cls.__name__.lower(), data.n_items)
    fresh.load_state_dict(load(save(m.state_dict())))
    b = next(iter(EvalLoader(data.test, batch_size=64)))
    assert torch.equal(m.scores(b), fresh.scores(b))
    with pytest.raises(RuntimeError): fresh.load_state_dict({})

@pytest.mark.parametrize('cls', ALL)
def test_only_training_rows_count(cls):
    d, spoiled = synthetic(300, seed=0), synthetic(300, seed=0)
    for split in (spoiled.valid, spoiled.test): split.seqs.items[split.stop] = 7
    a, b = (cls.from_data(x).state_dict() for x in (d, spoiled))
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('cls', ALL)
def test_a_million_items_need_no_square(cls):
    d = table([1, 999_999, 5, 6, 7, 8], [1_000_000, 1, 2, 3], n_items=10**6)
    r = rankings(cls.from_data(d), EvalLoader(d.test))['masked']
    assert len(r) == 2 and (r.above + r.ties < r.n_candidates).all()

def test_tie_break_survives_the_evaluator():
    "Items 3 and 4 followed item 1 equally often; 4 is more popular by one, and float32 would not see it"
    d = table(*[[1, 3, 6, 6]] * 10, *[[1, 4, 6, 6]] * 10, [4, 6, 6], [2, 1, 5, 3], [2, 1, 5, 4])
    d.test.seqs.items[d.test.stop[-2:] - 1] = 1       # both test histories end in item 1
    r = ranks(Markov.from_data(d), EvalLoader(d.test), mask_seen=False).where(slice(-2, None))
    assert r.target.tolist() == [3, 4] and r.above.tolist() == [1, 0] and r.ties.tolist() == [0, 0]

FLOORS = {('ml-1m', 'P-sas'): [(.0369, .0180), (.2144, .1259), (.2553, .1466)],
          ('ml-1m', 'P-seed'): [(.0408, .0192), (.1729, .1007), (.2093, .1182)],
          ('ml-100k', 'P-raw'): [(.0848, .0441), (.1448, .0768), (.1739, .0933)]}

@needs_data
@pytest.mark.parametrize('name,protocol', FLOORS)
def test_floors(name, protocol):
    "hybrid.md 1.14, computed there by other code"
    from seqrec_nb.data.splits import load
    d = load(name, protocol)
    for cls, floor in zip(ALL, FLOORS[name, protocol]):
        both = rankings(cls.from_data(d), EvalLoader(d.test, max_len=10))
        got = averages(both['masked'], ks=(10,))
        assert (got['HR@10'], got['NDCG@10']) == pytest.approx(floor, abs=1e-4)
        if cls is Markov and protocol == 'P-seed':
            g = summary(both['masked'], ks=(10,))['grouped_metrics']
            assert [g[n]['count'] for n in ('short', 'medium', 'long')] == [162, 2579, 3293]
            got = [g[n]['HR@10'] for n in ('short', 'medium', 'long')]
            assert got == pytest.approx([.2778, .2222, .1291], abs=1e-4)
        if cls is Popularity and protocol == 'P-seed':
            worst = averages(both['unmasked'].settle('worst'), ks=(10,))
            assert (worst['HR@10'], worst['NDCG@10']) == pytest.approx((.0229, .0109), abs=1e-4)
