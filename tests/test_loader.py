"Windows against plain Python, every target exactly once, little padding, order a function of seed and epoch."
from functools import cache
import numpy as np, pytest, torch
from conftest import needs_data
from seqrec_nb.data.loader import WINDOWS, EvalLoader, Loader, deal
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out, load

load = cache(load)

def histories(users=50, longest=23, seed=0, n_items=9, times=True):
    "Random histories with repeats, users of 1, 2 and 3 rows among them"
    rng = np.random.default_rng(seed); n = rng.integers(1, longest, users); n[:4] = 1, 2, 3, 4
    return leave_one_out(Sequences(rng.integers(1, n_items + 1, n.sum()).astype(np.int32), np.r_[0, n.cumsum()],
                                   rng.integers(0, 99, n.sum()).cumsum() if times else None, np.arange(users), np.arange(n_items)))

def read(b, r):
    "Row r of a batch without its padding: user, length, row, items, target, times"
    n, one = int(b.mask[r].sum()), b.target.dim() == 1
    assert b.items.shape[1] == max(1, int(b.mask.sum(1).max())) and (b.time is None or b.time.shape[1] == b.items.shape[1] + 1)
    assert b.mask[r, :n].all()                                   # padding is on the right
    t = int(b.target[r]) if one else b.target[r, :n].tolist()
    assert one or not b.target[r, n:].any()
    time = None if b.time is None else b.time[r, :n + 1].tolist()
    return int(b.user[r]), int(b.length[r]), int(b.row[r]), b.items[r, :n].tolist(), t, time

def reference(d, samples, window, L):
    "All training samples by slicing lists"
    out = []
    for r in range(len(d.train)):
        a, z = int(d.train.start[r]), int(d.train.stop[r])
        ends = list(range(a + 1, z))                             # places of targets
        first = max(a, z - L) if samples == 'prefix_bsa' else a  # no window reaches behind it
        if samples == 'prefix_bsa': ends = list(range(first, z))
        elif samples != 'prefix': ends = ends[::-1][::L] if (samples, window) == ('all', 'every') else ends[-1:]
        for k in ends:
            low = max(first, k - L); item, time = d.seqs.items[low:k + 1].tolist(), d.seqs.times[low:k + 1].tolist()
            out.append((int(d.train.user[r]), k - a, r, item[:-1], item[1:] if samples == 'all' else item[-1], time))
    return out

def rows_of(loader, epoch=0): return [read(b, r) for step in loader.steps(epoch) for b in step for r in range(len(b))]

@pytest.mark.parametrize('L', [1, 2, 5, 22, 40])
@pytest.mark.parametrize('samples, window', [('all', 'last'), ('all', 'every'), ('prefix', 'last'), ('prefix_bsa', 'last'), ('last', 'last')])
def test_windows_against_plain_python(samples, window, L):
    d = histories()
    loader = Loader(d.train, L, 7, samples, window, time=True)
    found = rows_of(loader)
    assert sorted(found) == sorted(reference(d, samples, window, L)) and len(found) == len(loader)
    assert loader.n_targets == sum(len(f[4]) if samples == 'all' else 1 for f in found)

@pytest.mark.parametrize('L', [1, 3, 8])
def test_random_windows(L):
    d = histories(users=14, longest=14); loader = Loader(d.train, L, 7, 'all', 'random', time=True, seed=3)
    ends, again = [], []
    for epoch in range(150):
        rows = rows_of(loader, epoch)
        assert sorted(r[2] for r in rows) == sorted(r for r in range(len(d.train)) if d.train.length[r] > 1)
        for user, n, r, items, target, time in rows:
            h, low = d.train.history(r).tolist(), max(0, n - L)
            at = int(d.train.start[r])
            assert items == h[low:n] and target == h[low + 1:n + 1] and time == d.seqs.times[at + low:at + n + 1].tolist()
            assert len(items) == min(L, len(h) - 1)              # never shorter than it could be
        ends += [(r[2], r[1]) for r in rows]
    for r in range(len(d.train)):                                # every possible end is drawn
        n = int(d.train.length[r])
        if n > 1: assert {e for q, e in ends if q == r} == set(range(min(L, n - 1), n))
    assert [r[1] for r in rows_of(loader, 5)] == [r[1] for r in rows_of(loader, 5)]

@pytest.mark.parametrize('samples, window, L', [('prefix', w, 4) for w in WINDOWS] + [('all', 'every', 4), ('all', 'every', 50), ('all', 'last', 50)])
def test_every_target_exactly_once(samples, window, L):
    "A prefix loader promises all prefixes, and windows of every part promise all positions"
    d = histories(); s = d.seqs
    numbered = Sequences(np.arange(1, len(s.items) + 1, dtype=np.int32), s.offsets, None, s.user_ids, np.arange(len(s.items)))
    try: loader = Loader(leave_one_out(numbered).train, L, 8, samples, window)
    except ValueError: return                                    # to refuse what makes no sense is as good
    found = [t for row in rows_of(loader) for t in np.atleast_1d(row[4])]
    want = [k + 1 for a, z in zip(d.train.start, d.train.stop) for k in range(a + 1, z)]
    assert sorted(found) == want

@pytest.mark.parametrize('L', [1, 6])
def test_batches_of_empty_rows(L):
    "One column of padding, whose end is column 0; a window of one item has no other samples"
    d = histories(); loader = Loader(d.train, L, 4, 'prefix_bsa', time=True, parts=4)
    batches = [b for step in loader.steps(0) for b in step]
    empty = [b for b in batches if not b.mask.any()]
    assert empty and (L > 1 or len(empty) == len(batches)) and loader.padding() >= 1
    for b in empty:
        assert b.items.tolist() == [[0]] * len(b) and b.last.tolist() == [0] * len(b) and b.n_targets == len(b)
        assert (b.time[:, 0] == b.time[:, 1]).all()              # no gap before the first item
        assert b.at_last(torch.ones(len(b), 1, 3)).shape == (len(b), 3)
    one = Loader(d.train.take([0]), L, 4, 'prefix_bsa')          # a single item is the first of something
    assert [row[3:5] for row in rows_of(one)] == [([], int(d.train.history(0)[0]))]

def test_lengths_are_those_of_whole_histories():
    "Windows that begin late say how much they leave out, as all others do"
    d = histories(longest=40)
    for user, n, r, items, target, _ in rows_of(Loader(d.train, 5, 7, 'prefix_bsa')):
        h = d.train.history(r).tolist()
        assert target == h[n] and items == h[max(0, len(h) - 5):n] and n >= len(items)

@pytest.mark.parametrize('batch_size', [1, 2, 7, 64])
@pytest.mark.parametrize('parts', [None, 1, 3, 8])
def test_steps_and_counts(batch_size, parts):
    d = histories(users=57); loader = Loader(d.train, 10, batch_size, parts=parts)
    steps = list(loader.steps(0)); sizes = [sum(map(len, s)) for s in steps]
    assert len(steps) == loader.n_steps and max(sizes) <= batch_size and max(sizes) - min(sizes) <= max(1, batch_size // 2)
    assert all(b.n_targets == int((b.target > 0).sum()) > 0 and b.mask.any(0).all() for s in steps for b in s)
    assert sum(b.n_targets for s in steps for b in s) == loader.n_targets

@pytest.mark.parametrize('samples, window', [('all', 'last'), ('all', 'every'), ('all', 'random'), ('prefix', 'last'), ('prefix_bsa', 'last'), ('last', 'last')])
def test_order_is_a_function_of_seed_and_epoch(samples, window):
    d = histories(); make = lambda seed=0: Loader(d.train, 5, 6, samples, window, seed=seed)
    one, two = make(), make()
    rows_of(two, 9); torch.rand(3); np.random.rand(3)            # what happened before does not matter
    assert rows_of(one, 1) == rows_of(two, 1)
    assert rows_of(one, 1) != rows_of(one, 2) and rows_of(one, 1) != rows_of(make(1), 1)

@pytest.mark.parametrize('kind', [np.int64, np.int32])
def test_a_seed_of_numpy_is_the_same_seed(kind):
    "`for seed in np.arange(5)` writes a plain 0 into experiment.json, which must rerun to the same bits"
    d = histories()
    assert rows_of(Loader(d.train, 5, 6, seed=kind(4))) == rows_of(Loader(d.train, 5, 6, seed=4))

@pytest.mark.parametrize('window', WINDOWS)
def test_an_epoch_continues_from_any_step(window):
    loader = Loader(histories().train, 5, 6, 'all', window, seed=2)
    whole = [[read(b, r) for b in s for r in range(len(b))] for s in loader.steps(3)]
    for start in (0, 1, len(whole) - 1, len(whole)):
        fresh = Loader(histories().train, 5, 6, 'all', window, seed=2)
        assert [[read(b, r) for b in s for r in range(len(b))] for s in fresh.steps(3, start)] == whole[start:]

def test_dealing_mixes_lengths():
    "Rows of a step are not all of one length, and all rows are dealt once"
    n = np.random.default_rng(0).integers(1, 100, 1000)
    hands = deal(n, 50, 8, 0, 0)
    assert sorted(np.concatenate([b for h in hands for b in h])) == list(range(1000))
    means = [n[np.concatenate(h)].mean() for h in hands]
    assert np.std(means) < .05 * n.mean()                        # every step sees short and long rows alike

@pytest.mark.parametrize('L', [1, 4, 30])
@pytest.mark.parametrize('which', ['valid', 'test'])
def test_evaluation_rows(L, which):
    d = histories(); split = getattr(d, which); loader = EvalLoader(split, L, 6, time=True)
    batches = list(loader)
    found = [read(b, r) for b in batches for r in range(len(b))]
    assert len(loader) == len(split) and sorted(f[2] for f in found) == list(range(len(split)))
    widths = [len(f[3]) for f in found]
    assert widths == sorted(widths, reverse=True) and all(b.mask.any(0).all() for b in batches)
    for user, n, r, items, target, time in found:
        h, at = split.history(r).tolist(), int(split.start[r])
        assert (user, n, target) == (split.user[r], len(h), split.target[r]) and items == h[-L:]
        assert time == d.seqs.times[max(at, at + n - L):at + n + 1].tolist()

@pytest.mark.parametrize('L', [1, 30])
def test_seen_is_the_whole_history_once_without_the_target(L):
    d = histories(n_items=5); repeated = 0
    for split in (d.valid, d.test):
        loader = EvalLoader(split, L, 6)
        for b in loader:
            r, i = loader.seen(b); pairs = list(zip(r.tolist(), i.tolist()))
            want = {(k, int(x)) for k in range(len(b)) for x in split.history(int(b.row[k]))} - {(k, int(b.target[k])) for k in range(len(b))}
            assert r.dtype == i.dtype == torch.int64 and len(pairs) == len(set(pairs)) and set(pairs) == want
            repeated += sum(int(b.target[k]) in split.history(int(b.row[k])) for k in range(len(b)))
    assert repeated > 5                                          # the case of interest occurs

def test_parts_of_a_split():
    d = histories(); some = d.test.take(d.test.user % 3 == 0); loader = EvalLoader(some, 10, 4)
    for b in loader:
        assert (b.user % 3 == 0).all() and b.target.tolist() == some.target[b.row].tolist()
        r, i = loader.seen(b)
        assert all(x in some.history(int(b.row[k])) for k, x in zip(r.tolist(), i.tolist()))

def test_an_empty_split_has_no_batches(): assert list(EvalLoader(histories().test.take(slice(0, 0)))) == []

def test_bad_arguments():
    d = histories(times=False)
    with pytest.raises(ValueError, match="did you mean 'prefix'"): Loader(d.train, samples='prefixes')
    with pytest.raises(ValueError, match="did you mean 'random'"): Loader(d.train, window='randm')
    with pytest.raises(ValueError, match='only an order'): Loader(d.train, time=True)
    with pytest.raises(ValueError, match='only an order'): EvalLoader(d.test, time=True)
    with pytest.raises(ValueError, match='no target'): EvalLoader(d.train)
    with pytest.raises(ValueError, match='fewer than two'): Loader(d.train.take([0]))

@needs_data
@pytest.mark.parametrize('L', [50, 200])
@pytest.mark.parametrize('name, protocol', [('ml-1m', 'P-sas'), ('lastfm', 'P-bsa'), ('beauty', 'P-bsa')])
def test_padding_of_real_data(name, protocol, L):
    loader = Loader(load(name, protocol).train, L, 128)
    cells = tokens = 0
    for step in loader.steps(1):
        for b in step: cells += b.items.numel(); tokens += int(b.mask.sum())
    assert tokens == loader.n_targets and cells < 1.05 * tokens
