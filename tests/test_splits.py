"Protocols against the published counts and files, leave-one-out and cut dates against plain Python."
from functools import cache
import numpy as np, pandas as pd, pytest
from conftest import needs_data
from seqrec_nb.data.interactions import Interactions
from seqrec_nb.data.loader import EvalLoader, targets_at
from seqrec_nb.data.sequences import Sequences, to_sequences
from seqrec_nb.data.splits import PROTOCOLS, Protocol, as_protocol, cut_date, leave_one_out, load
from seqrec_nb.metrics import GROUPS

load = cache(load)                         # reading a real set takes seconds

def log(seed=0, users=40, items=15, longest=12):
    "A shuffled log with repeats, ties and users of one row"
    rng = np.random.default_rng(seed)
    n = rng.integers(1, longest, users); n[:6] = 1, 2, 3, 1, 2, 3
    user = np.repeat([f'u{k:02}' for k in range(users)], n)
    frame = pd.DataFrame(dict(user=user, item=rng.integers(100, 100 + items, len(user)),
                              timestamp=rng.integers(10**9, 10**9 + 6, len(user)),
                              rating=rng.integers(1, 6, len(user))))
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)

def slowly(frame, min_rating=0, min_item=0, min_user=0):
    "Protocol rules, one row at a time: user -> raw items, oldest first, ties in the order of the file"
    rows = [r for r in frame.itertuples() if r.rating >= min_rating]
    count = lambda rows, of: {k: sum(getattr(r, of) == k for r in rows) for k in {getattr(r, of) for r in rows}}
    c = count(rows, 'item'); rows = [r for r in rows if c[r.item] >= min_item]
    c = count(rows, 'user'); rows = [r for r in rows if c[r.user] >= min_user]
    users = {u: [] for u in sorted({r.user for r in rows})}
    for r in sorted(rows, key=lambda r: r.timestamp): users[r.user].append(r.item)  # sorted() is stable
    return users

def raw(data, split, r):
    "A row of a split in original ids: user, history, target"
    ids, t = data.seqs.item_ids, split.target
    return (data.seqs.user_ids[split.user[r]], ids[split.history(r) - 1].tolist(), None if t is None else ids[t[r] - 1])

RULES = {'P-raw': {}, 'P-bsa': {}, 'P-sas': dict(min_item=5), 'P-seed': dict(min_rating=4, min_user=5)}

@pytest.mark.parametrize('name', PROTOCOLS)
@pytest.mark.parametrize('seed', range(3))
def test_protocols_against_plain_python(name, seed):
    frame = log(seed)
    want, d = slowly(frame, **RULES[name]), load.__wrapped__(frame, name)
    assert d.protocol == name and d.seqs.user_ids.tolist() == list(want)
    assert [raw(d, d.train, r) for r in range(len(d.train))] == [(u, s[:-2] if len(s) > 2 else s, None) for u, s in want.items()]
    long = {u: s for u, s in want.items() if len(s) > 2}
    assert [raw(d, d.valid, r) for r in range(len(d.valid))] == [(u, s[:-2], s[-2]) for u, s in long.items()]
    assert [raw(d, d.test, r) for r in range(len(d.test))] == [(u, s[:-1], s[-1]) for u, s in long.items()]
    assert d.n_interactions == sum(map(len, want.values())) and d.n_users == len(want)
    assert d.n_items == len({i for s in want.values() for i in s}) and d.seqs.items.min() == 1

def test_users_of_one_two_and_three_rows():
    d = leave_one_out(Sequences(np.arange(1, 7, dtype=np.int32), np.array([0, 1, 3, 6]), None, np.arange(3), np.arange(6)))
    assert [d.train.history(r).tolist() for r in range(3)] == [[1], [2, 3], [4]]
    assert d.valid.user.tolist() == d.test.user.tolist() == [2]
    assert d.valid.history(0).tolist() == [4] and d.valid.target.tolist() == [5]
    assert d.test.history(0).tolist() == [4, 5] and d.test.target.tolist() == [6]
    assert d.train.target is None and d.test.length.tolist() == [2]

def test_nobody_to_test_is_an_empty_split():
    d = load.__wrapped__(pd.DataFrame(dict(user=[1, 1, 2], item=[5, 6, 5], timestamp=[10**9, 10**9 + 1, 10**9])), 'P-raw')
    assert len(d.train) == 2 and len(d.valid) == len(d.test) == 0 and d.test.target.tolist() == []

def no_leak(d):
    "Table positions that a split predicts are not read by an earlier split"
    train = np.concatenate([np.arange(a, b) for a, b in zip(d.train.start, d.train.stop)])
    for s in (d.valid, d.test): assert not np.isin(s.stop, train).any()
    valid = np.concatenate([np.arange(a, b) for a, b in zip(d.valid.start, d.valid.stop)] or [[]])
    assert not np.isin(d.test.stop, valid).any()
    for samples, window in (('all', 'every'), ('prefix', 'last'), ('all', 'last')):
        assert np.isin(targets_at(d.train, samples, window, 3)[0], train).all()

@pytest.mark.parametrize('seed', range(3))
def test_no_target_is_trained_on(seed):
    frame = log(seed, users=80)
    no_leak(load.__wrapped__(frame, 'P-raw'))
    no_leak(cut_date(to_sequences(Interactions.read(frame)), 10**9 + 2, 10**9 + 4))

@pytest.mark.parametrize('seed', range(4))
def test_cut_date_against_plain_python(seed):
    frame = log(seed, users=60); a, b = 10**9 + 2, 10**9 + 4
    d = cut_date(to_sequences(Interactions.read(frame)), a, b)
    users = {u: [(r.item, r.timestamp) for r in sorted(g.itertuples(), key=lambda r: r.timestamp)]
             for u, g in frame.groupby('user')}
    rows = lambda s: [raw(d, s, r) for r in range(len(s))]
    first = {u: [i for i, t in s if t < a] for u, s in users.items()}
    assert rows(d.train) == [(u, s, None) for u, s in first.items() if s]
    for split, low, high in ((d.valid, a, b), (d.test, b, np.inf)):
        want = []
        for u, s in users.items():
            at = [k for k, (i, t) in enumerate(s) if low <= t < high]
            if at and at[-1]: want.append((u, [i for i, _ in s[:at[-1]]], s[at[-1]][0]))
        assert rows(split) == want and len(want)

def test_cut_date_knows_no_later_time():
    "What training sees lies before the first border; validation is blind to everything after the second"
    d = cut_date(to_sequences(Interactions.read(log(5, users=60))), 10**9 + 2, 10**9 + 4)
    t = d.seqs.times
    assert all((t[a:b] < 10**9 + 2).all() for a, b in zip(d.train.start, d.train.stop))
    assert all((t[a:b + 1] < 10**9 + 4).all() for a, b in zip(d.valid.start, d.valid.stop))
    assert ((t[d.valid.stop] >= 10**9 + 2) & (t[d.valid.stop] < 10**9 + 4)).all() and (t[d.test.stop] >= 10**9 + 4).all()

def test_later_rows_do_not_change_earlier_splits():
    frame = log(6, users=60); late = frame.timestamp >= 10**9 + 4
    other = frame.copy(); other.loc[late, 'item'] = other.loc[late, 'item'].to_numpy()[::-1]
    one, two = (cut_date(to_sequences(Interactions.read(f)), 10**9 + 2, 10**9 + 4) for f in (frame, other))
    rows = lambda d, s: [raw(d, s, r) for r in range(len(s))]
    assert not frame.equals(other)
    for s in ('train', 'valid'): assert rows(one, getattr(one, s)) == rows(two, getattr(two, s))

@pytest.mark.parametrize('a, b, message', [(5, 5, 'before test_from'), (6, 5, 'before test_from'), (0, 5, 'no interaction')])
def test_impossible_dates(a, b, message):
    seqs = Sequences(np.array([1, 2], np.int32), np.array([0, 2]), np.array([3, 4]), np.arange(1), np.arange(2))
    with pytest.raises(ValueError, match=message): cut_date(seqs, a, b)

def test_dates_need_times():
    seqs = Sequences(np.array([1, 2], np.int32), np.array([0, 2]), None, np.arange(1), np.arange(2))
    with pytest.raises(ValueError, match='times'): cut_date(seqs, 1, 2)

def test_ties_keep_the_order_of_the_file():
    n = 2000                                # long enough for an unstable sort to show
    frame = pd.DataFrame(dict(user=np.arange(n) % 3, item=np.random.default_rng(0).permutation(n), timestamp=10**9))
    d = load.__wrapped__(frame, 'P-raw')
    for u in range(3): assert d.seqs.item_ids[d.seqs[u] - 1].tolist() == frame.item[frame.user == u].tolist()

def test_order_of_users_in_the_file_does_not_matter():
    frame = log(7, users=50)
    one = load.__wrapped__(frame, 'P-sas')
    for seed in range(3):
        users = np.random.default_rng(seed).permutation(frame.user.unique())
        other = pd.concat([frame[frame.user == u] for u in users], ignore_index=True)
        assert not other.equals(frame) and load.__wrapped__(other, 'P-sas').fingerprint == one.fingerprint

def test_order_within_a_tie_is_part_of_the_data():
    frame = pd.DataFrame(dict(user=1, item=[1, 2, 3, 4], timestamp=np.array([0, 0, 1, 1]) + 10**9))
    swapped = frame.assign(item=[2, 1, 3, 4])
    assert load.__wrapped__(frame).fingerprint != load.__wrapped__(swapped).fingerprint

def test_fingerprint_sees_what_a_model_sees():
    make = lambda items=(1, 2, 3), offsets=(0, 3), times=(1, 2, 3), users=(9,), ids=(4, 5, 6), unit='s': Sequences(
        np.array(items, np.int32), np.array(offsets), None if times is None else np.array(times), np.array(users), np.array(ids), None, unit)
    all = [make(), make(items=(2, 1, 3)), make(times=(1, 2, 4)), make(times=None), make(users=(8,)), make(ids=(4, 5, 7)),
           make(unit='ms'), make(offsets=(0, 2, 3), users=(8, 9))]
    assert len({s.fingerprint for s in all}) == len(all) and make().fingerprint == make().fingerprint

def test_core_is_repeated_until_nothing_changes():
    x = Interactions.read(log(8, users=60, items=40))
    s, once = (to_sequences(x, min_item=5, min_user=5, core=core) for core in (True, False))
    assert s.lengths.min() >= 5 and np.bincount(s.items)[1:].min() >= 5
    assert np.bincount(once.items)[1:].min() < 5                # so the repetition matters here

def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'P-sas'"): as_protocol('P-sass')
    with pytest.raises(FileNotFoundError, match="did you mean 'ml-100k'"): load('ml-100kk')
    with pytest.raises(ValueError, match='no interactions are left'): load.__wrapped__(log(), Protocol('none', min_item=10**6))
    with pytest.raises(ValueError, match='no ratings'): load.__wrapped__(log().drop(columns='rating'), 'P-seed')
    assert as_protocol(None).name == 'P-raw' and as_protocol(PROTOCOLS['P-sas']) is PROTOCOLS['P-sas']

def groups(d): return np.bincount(np.searchsorted(list(GROUPS.values()), d.test.length), minlength=3).tolist()

@needs_data
@pytest.mark.parametrize('name, protocol, users, items, rows, parts', [
    ('ml-1m', 'P-sas', 6040, 3416, 999611, None), ('ml-1m', 'P-seed', 6034, 3533, 575272, [162, 2579, 3293]),
    ('ml-100k', 'P-raw', 943, 1682, 100000, None), ('ml-100k', 'P-seed', 938, 1447, 55361, [86, 494, 358]),
    ('lastfm', 'P-bsa', 1090, 3646, 52551, None), ('lastfm', 'P-raw', 1090, 3646, 52551, None),
    ('beauty', 'P-bsa', 22363, 12101, 198502, None)])
def test_published_counts(name, protocol, users, items, rows, parts):
    d = load(name, protocol)
    assert (d.n_users, d.n_items, d.n_interactions) == (users, items, rows)
    assert len(d.valid) == len(d.test) == users and d.train.n_interactions == rows - 2 * users
    if parts: assert groups(d) == parts
    assert (d.test.length == d.seqs.lengths - 1).all()

@needs_data
def test_sasrec_file_up_to_the_names_of_items(data_dir):
    theirs = np.loadtxt(data_dir/'ml-1m/ml-1m_sasrec.txt', dtype=np.int64)
    ours = load('ml-1m', 'P-sas').seqs
    theirs = np.split(theirs[:, 1], np.flatnonzero(np.diff(theirs[:, 0])) + 1)
    ours = [ours[u] for u in range(ours.n_users)]
    # they number users otherwise: how popular each item of a history is tells users apart
    pop = [np.bincount(np.concatenate(h)) for h in (theirs, ours)]
    by_shape = [{p[h].astype(int).tobytes(): h for h in hs} for p, hs in zip(pop, (theirs, ours))]
    assert by_shape[0].keys() == by_shape[1].keys() and len(by_shape[0]) == len(theirs) == len(ours) == 6040
    there, here = (np.concatenate([b[k] for k in by_shape[0]]) for b in by_shape)
    names = np.unique(np.c_[there, here], axis=0).T
    assert len(there) == 999611 and [len(set(n)) for n in names] == [names.shape[1]] * 2 == [3416] * 2

@needs_data
def test_seed_protocol_prefixes():
    at, row = targets_at(load('ml-1m', 'P-seed').train, 'prefix')
    assert len(at) == len(set(at.tolist())) == 557170

@needs_data
def test_groups_come_from_true_lengths():
    d = load('ml-1m', 'P-seed')
    for max_len in (50, 200):
        n = np.concatenate([b.length.numpy() for b in EvalLoader(d.test, max_len, 4096)])
        assert np.bincount(np.searchsorted(list(GROUPS.values()), n)).tolist() == [162, 2579, 3293]

@needs_data
def test_real_rows_do_not_leak():
    for name, protocol in (('ml-100k', 'P-raw'), ('lastfm', 'P-bsa')): no_leak(load(name, protocol))
    s = load('ml-100k', 'P-raw').seqs
    a, b = np.quantile(s.times, [.8, .9]).astype(int)
    d = cut_date(s, a, b); no_leak(d)
    assert min(len(d.train), len(d.valid), len(d.test)) > 50
