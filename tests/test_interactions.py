"Reading interactions: every format gives one fingerprint, every kind of damage a named error, ids and times come back exactly."
import gzip, io, json, subprocess, sys, zipfile
from datetime import datetime, timedelta, timezone
import numpy as np, pandas as pd, pytest
from conftest import ROOT, needs_data
from seqrec_nb.data.formats import DataError
from seqrec_nb.data.interactions import Interactions
from seqrec_nb.data.titles import read_titles

T = 978_300_760
DF = pd.DataFrame(dict(userId=[5, 5, 2, 2, 9, 5], movieId=[10, 2**33, 10, 7, 2**33, 7], rating=[3., 4.5, 5., 1., 2., 4.],
                       timestamp=[T + 5, T + 5, T, T + 90_000, T + 1, T]))
FINGERPRINT = 'fbead9a6917543f75ec1f9291fbed5f455d9550008b7bd26d8b9b1a3eb764f30'
read = Interactions.read

def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

def csv(df=DF, **kw): return df.to_csv(index=False, lineterminator='\n', **kw)

def raw(x):
    "The rows with their original values"
    return list(zip(x.users[x.user].tolist(), x.items[x.item].tolist(), [None] * len(x) if x.time is None else x.time.tolist()))

def lines(n=300, bad=()):
    "A csv of `n` good rows in which some lines are replaced: {line number: text}"
    rows = ['user,item,time'] + [f'{i % 40},{i % 17},{T + i}' for i in range(n)]
    for number, text in dict(bad).items(): rows[number - 1] = text
    return '\n'.join(rows) + '\n'

# formats

def zip_of(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, data in members.items(): z.writestr(name.replace('_', '.'), data)
    return out.getvalue()

FORMATS = {
    'a.csv': csv(), 'a.tsv': csv(sep='\t'), 'semicolon.csv': csv(sep=';'), 'bar.txt': csv(sep='|'), 'blank.txt': csv(sep=' '),
    'bom.csv': b'\xef\xbb\xbf' + csv().encode(), 'crlf.csv': csv().replace('\n', '\r\n'), 'utf16.csv': csv().encode('utf-16'),
    'no_newline_at_end.csv': csv().rstrip('\n'), 'blank_lines.csv': csv().replace('\n', '\n\n', 3) + '\n\n',
    'quoted.csv': csv(quoting=1), 'spaces.csv': csv().replace(',', ', '), 'upper.csv': csv().replace('userId', 'USER ID'),
    'u.data': csv(sep='\t', header=False), 'ratings.dat': csv(sep=';', header=False).replace(';', '::'),
    'header.dat': csv(sep=';').replace(';', '::'), 'headerless.csv': csv(header=False),
    'x.inter': csv(DF.assign(timestamp=DF.timestamp.astype(float)), sep='\t').replace(
        'userId\tmovieId\trating\ttimestamp', 'user_id:token\titem_id:token\trating:float\ttimestamp:float'),
    'order.csv': csv(DF[['timestamp', 'movieId', 'rating', 'userId']]), 'more.csv': csv(DF.assign(comment='é', n=1)),
    'dates.csv': csv(DF.assign(timestamp=pd.to_datetime(DF.timestamp, unit='s'))),
    'zoned.csv': csv(DF.assign(timestamp=pd.to_datetime(DF.timestamp, unit='s', utc=True).dt.tz_convert('Asia/Tokyo'))),
    'a.csv.gz': gzip.compress(csv().encode()), 'one.zip': zip_of(any_csv=csv()),
    'movielens.zip': zip_of(README='hello', ratings_csv=csv(), movies_csv='movieId,title\n7,x\n')}

@pytest.mark.parametrize('name', FORMATS)
def test_formats(name, tmp_path):
    x = read(put(tmp_path/name, FORMATS[name]))
    assert raw(x) == list(zip(DF.userId, DF.movieId, DF.timestamp)) and x.unit == 's'
    assert x.rating.dtype == np.float32 and x.rating.tolist() == DF.rating.tolist()
    assert x.fingerprint == read(DF).fingerprint

@pytest.mark.parametrize('name', ['a.parquet', 'zip'])
def test_parquet(name, tmp_path):
    DF.to_parquet(tmp_path/'a.parquet')
    if name == 'zip': put(tmp_path/'zip.zip', zip_of(a_parquet=(tmp_path/'a.parquet').read_bytes()))
    assert read(tmp_path/('zip.zip' if name == 'zip' else name)).fingerprint == read(DF).fingerprint

FRAMES = {'strings': lambda d: d.assign(userId=d.userId.astype(str)), 'categories': lambda d: d.assign(userId=d.userId.astype(str).astype('category')),
          'objects': lambda d: d.assign(userId=d.userId.astype(str).astype(object))}

@pytest.mark.parametrize('kind', FRAMES)
def test_string_ids_of_a_frame_stay_strings(kind, tmp_path):
    d = FRAMES[kind](DF)
    x = read(d)
    assert x.users.tolist() == ['2', '5', '9'] and x.users.dtype == object
    d.to_parquet(tmp_path/'a.parquet')
    assert read(tmp_path/'a.parquet').users.tolist() == ['2', '5', '9']

@pytest.mark.parametrize('dtype', ['int32', 'uint16', 'Int64', 'int64[pyarrow]', 'category', 'object'])
def test_integer_frames(dtype):
    x = read(DF.assign(userId=DF.userId.astype(dtype), timestamp=DF.timestamp.astype('int64' if dtype == 'uint16' else dtype)))
    assert x.users.dtype == np.int64 and x.fingerprint == read(DF).fingerprint

@pytest.mark.parametrize('text,users,items', [
    ('1 5 6 5\n2 9\n3 5 6 7 8 9 10\n', [1, 1, 1, 2, 3, 3, 3, 3, 3, 3], [5, 6, 5, 9, 5, 6, 7, 8, 9, 10]),
    ('7 1  2\n\n 3 4\n', [7, 7, 3], [1, 2, 4]),                     # more blanks, a blank line
    ('1 5\n1 6\n2 5\n', [1, 1, 2], [5, 6, 5]),                      # pairs
    ('a x1 y1\nb x1 y2 z9 1\n', ['a'] * 2 + ['b'] * 4, ['x1', 'y1', 'x1', 'y2', 'z9', '1'])])
def test_sequences_and_pairs(text, users, items, tmp_path):
    x = read(put(tmp_path/'s.txt', text), layout='sequences' if text[0] == 'a' else None)
    assert [(u, i) for u, i, _ in raw(x)] == list(zip(users, items))
    assert x.time is None and x.unit == 'order' and x.order.tolist() == np.argsort(x.user, kind='stable').tolist()
    assert 'order of rows' in str(x.report)

def test_layout_decides_what_is_ambiguous(tmp_path):
    p = put(tmp_path/'s.txt', '1 5 6\n2 7 8\n')
    assert len(read(p)) == 2 and read(p).rating is not None          # three fields on each line: a table
    assert len(read(p, layout='sequences')) == 4

def test_latin1_is_read_and_said(tmp_path):
    text = lines(20_000) + f'99,caf\u00e9,{T}\n'                       # far behind the first bytes
    x = read(put(tmp_path/'a.csv', text.encode('latin-1')))
    assert 'caf\u00e9' in x.items and any('latin-1' in n for n in x.report.notes)

# columns

@pytest.mark.parametrize('header,kw,message', [
    ('usr,movieId,t', {}, "did you mean user='usr'"),
    ('userId,thing,time', {}, 'no item column'),
    ('user,user_id,item', {}, '2 columns could be the user'),
    ('user,item,item', {}, '2 columns could be the item'),
    ('user,item,x', dict(user='usr'), "did you mean 'user'"),
    ('user,item,x', dict(item=7), 'numbered from 0'),
    ('user,item,x', dict(user='user', item='user'), 'one column was given for two roles'),
    ('user,item,x', dict(user='item', item='user'), 'look swapped'),
    ('x,x,item', dict(user='x'), "2 columns are called 'x'"),
    ('alpha,beta,gamma', {}, 'whether the first line is a header')])
@pytest.mark.parametrize('frame', [False, True])
def test_columns(header, kw, message, frame, tmp_path):
    if frame and 'header' in message: return
    x = pd.DataFrame([[1, 5, 3]], columns=header.split(',')) if frame else put(tmp_path/'a.csv', header + '\n1,5,3\n2,6,4\n')
    with pytest.raises(DataError, match=message): read(x, **kw)

def test_columns_by_name_and_number(tmp_path):
    p = put(tmp_path/'a.csv', 'who,what,stars\n1,5,3\n')
    assert raw(read(p, user='who', item='what')) == [(1, 5, None)]
    assert raw(read(p, user=1, item='who')) == [(5, 1, None)]
    assert raw(read(put(tmp_path/'b.csv', 'ann,tea,978300760\nbob,milk,978300761\n'))) == [('ann', 'tea', T), ('bob', 'milk', T + 1)]
    p = put(tmp_path/'c.csv', '9,1,5,978300760,2\n9,2,6,978300761,2\n')
    with pytest.raises(DataError, match='no user column'): read(p)
    assert raw(read(p, user=1, item=2, time=3)) == [(1, 5, T), (2, 6, T + 1)]

def test_swapped_rating_and_time():
    with pytest.raises(DataError, match='swapped'): read(DF, rating='timestamp', time='rating')

@pytest.mark.parametrize('data,message', [(b'', 'empty'), (b'\n\n', 'empty'), (b'hello\nworld\n', 'only one column'),
                                          (b'1 2 3\t0 4 4\n2 3 4\t0 1 1\n', 'gaps')])
def test_no_table(data, message, tmp_path):
    with pytest.raises(DataError, match=message): read(put(tmp_path/'a.txt', data))

def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError): read(tmp_path/'nothing.csv')
    with pytest.raises(DataError, match='folder'): read(tmp_path)
    with pytest.raises(ValueError, match='on_bad'): read(DF, on_bad='ignore')
    for name, data in [('a.csv.gz', gzip.compress(csv().encode() * 50)[:-20]), ('b.csv.gz', b'no gzip at all'), ('c.zip', b'no zip')]:
        with pytest.raises(DataError, match='damaged'): read(put(tmp_path/name, data))
    with pytest.raises(DataError, match='unpack the one'): read(put(tmp_path/'d.zip', zip_of(a_csv=csv(), b_csv=csv())))
    with pytest.raises(DataError, match='d.csv: no user'): read(put(tmp_path/'d.csv', 'a,item\n1,2\n'))
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.csv', bytes(50_000_000))
    with pytest.raises(DataError, match='50,000,000 bytes: refused'): read(put(tmp_path/'bomb.zip', out.getvalue()))

# bad lines

BAD = {'short row': ('7,9', '2 fields instead of 3'), 'long row': (f'7,9,{T},1', '4 fields instead of 3'),
       'empty user': (f',9,{T}', 'user is empty'), 'empty item': (f'7,,{T}', 'item is empty'), 'nan user': (f'NaN,9,{T}', 'user is empty'),
       'NUL byte': (f'7,9\0,{T}', 'item holds a NUL byte'), 'text time': ('7,9,yesterday', 'time is not a number'),
       'empty time': ('7,9,', 'time is empty'), 'nan time': ('7,9,nan', 'time is empty'), 'zero time': ('7,9,0', 'time is 0'),
       'negative time': ('7,9,-5', 'time is negative'), 'ms among s': (f'7,9,{T}000', 'looks like ms where most are s'),
       'small time': ('7,9,1234', 'outside 1980'), 'huge time': ('7,9,99999999999999999999', 'too large'),
       'infinite time': ('7,9,1e999', 'not finite'),
       'header again': ('user,item,time', 'the header is repeated')}

@pytest.mark.parametrize('kind', BAD)
def test_bad_lines(kind, tmp_path):
    text, reason = BAD[kind]
    p = put(tmp_path/'a.csv', lines(bad={7: text, 200: text}))
    with pytest.raises(DataError) as e: read(p)
    assert reason in str(e.value) and 'line 7, 200' in str(e.value) and '2 × ' in str(e.value)
    x = read(p, on_bad='drop')
    assert len(x) == 298 and x.report.rejected[0][:3] == (x.report.rejected[0][0], 2, [7, 200]) and reason in x.report.rejected[0][0]
    assert x.users.dtype == x.items.dtype == np.int64, 'junk in a bad row must not change the type of ids'
    assert x.report.read == 300 and '2 rejected' in str(x.report)
    good = put(tmp_path/'b.csv', '\n'.join(l for i, l in enumerate(lines().split('\n'), 1) if i not in (7, 200)))
    assert x.fingerprint == read(good).fingerprint, 'dropping equals never having been there'

def test_drop_fails_over_one_percent(tmp_path):
    bad = {n: '7,9' for n in range(10, 13)}
    assert len(read(put(tmp_path/'a.csv', lines(bad=bad)), on_bad='drop')) == 297
    with pytest.raises(DataError, match='more than on_bad'):
        read(put(tmp_path/'a.csv', lines(bad={**bad, 20: '7,9'})), on_bad='drop')

def test_first_five_lines_and_all_kinds(tmp_path):
    bad = {n: '7,9' for n in range(10, 17)} | {30: ',1,1', 31: '7,9,yesterday'}
    with pytest.raises(DataError) as e: read(put(tmp_path/'a.csv', lines(bad=bad)))
    assert '9 of 300 rows' in str(e.value) and 'line 10, 11, 12, 13, 14 …' in str(e.value) and "'yesterday': line 31" in str(e.value)

def test_line_numbers_survive_torn_and_blank_lines(tmp_path):
    p = put(tmp_path/'a.csv', lines(bad={5: '', 6: '', 9: '1', 40: '1,2,3,4', 41: '', 100: '7,9,x'}))
    with pytest.raises(DataError, match="'x': line 100"): read(p)

@pytest.mark.parametrize('text,reason', [('1::5::3::978300760\n1::5:3::978300760\n', 'fields instead of'),
                                         ('1::5::3::978300760\n1::5:x:3::978300761\n', 'single colon'),
                                         ('1 5 6 7\n2\n3 4 5 6 7\n', 'a user without items.*line 2'),
                                         ('1 5\n1 6\n2\n', 'user without items')])
def test_bad_lines_of_other_layouts(text, reason, tmp_path):
    with pytest.raises(DataError, match=reason): read(put(tmp_path/'a.txt', text))

def test_bad_rating(tmp_path):
    for value in ['x', '', 'inf', 'nan']:
        p = put(tmp_path/'a.csv', f'user,item,rating\n1,2,3\n1,3,{value}\n')
        with pytest.raises(DataError, match='rating is not a number.*line 3'): read(p)

def test_wholly_other_format_stops(tmp_path, monkeypatch):
    import seqrec_nb.data.tables as tables
    monkeypatch.setattr(tables, 'TORN_MAX', 50)
    with pytest.raises(DataError): read(put(tmp_path/'a.csv', 'user,item\n' + '1,2\n' * 300_000 + '1,2,3\n' * 100))

# ids

IDS = [['7', '007'], ['12', 'a-1', 'B00\u00e9'], ['caf\u00e9', 'cafe\u0301'], ['\U0001F600', '\U0001F468\u200d\U0001F469\u200d\U0001F467', '\u05e9\u05dc\u05d5\u05dd'],
       ['x' * 10_000, 'y'], ['18446744073709551616', '1'], ['+5', '5'], ['-0', '0'], ['1e5', 'x'], ['true', 'false']]
INTS = [[0, 1], [-5, 3, 0], [2**31, 2**53 + 1, 2**63 - 1], [-2**63, 7], [1_000_000, 17]]

@pytest.mark.parametrize('ids', IDS + INTS, ids=lambda v: repr(v)[:30])
def test_ids_round_trip(ids, tmp_path):
    rows = [(u, i, T + k) for k, (u, i) in enumerate(zip(ids * 3, ids[::-1] * 3))]
    df = pd.DataFrame(rows, columns=['user', 'item', 'time'])
    from_file, from_frame = read(put(tmp_path/'a.csv', csv(df))), read(df)
    df.to_parquet(tmp_path/'a.parquet')
    for x in (from_file, from_frame, read(tmp_path/'a.parquet')):
        assert raw(x) == rows and x.user.dtype == x.item.dtype == np.int32
        assert all(type(i) is type(ids[0]) for i in x.items.tolist())
        assert x.items.tolist() == sorted(set(ids)) and x.decode_items(x.item).tolist() == [r[1] for r in rows]
    assert from_file.fingerprint == from_frame.fingerprint

@pytest.mark.parametrize('ids,note', [(['007', '8'], 'would lose its form'), (['18446744073709551616', '1'], '64 bits'),
                                      (['1', '2', '3', 'x'], 'not all are numbers'), (['caf\u00e9', 'cafe\u0301'], 'Unicode form')])
def test_what_is_said_of_ids(ids, note, tmp_path):
    x = read(put(tmp_path/'a.csv', csv(pd.DataFrame(dict(user=ids, item=1)))))
    assert any(note in n for n in x.report.notes) and note in str(x.report)

def test_blanks_around_ids_are_repaired(tmp_path):
    x = read(put(tmp_path/'a.csv', 'user,item\n 7,1\n7,2\n7 ,3\n'))
    assert x.users.tolist() == [7] and x.report.repaired == 2
    assert read(pd.DataFrame(dict(user=[' 7', '7'], item=1))).users.tolist() == [' 7', '7'], 'a frame is taken at its word'

@pytest.mark.parametrize('users,message', [
    (['12.0', '13.0'], 'floating point'), (['12.0', '12'], 'floating point'), (['1e5', '7'], 'floating point'), (['.5', '1'], 'floating point')])
def test_float_ids_in_text(users, message, tmp_path):
    with pytest.raises(DataError, match=message): read(put(tmp_path/'a.csv', csv(pd.DataFrame(dict(user=users, item=1)))))

@pytest.mark.parametrize('users,message', [
    ([12., 13.], 'floating point'), ([12., None], 'missing ones'), (pd.Series([7, '7'], dtype=object), 'mixed'), ([True, False], 'bool'),
    (pd.Series([1.5, 'a'], dtype=object), 'mixed'), ([b'a', b'b'], 'bytes'), (pd.Series([2**63 + 1, 2**63], dtype='uint64'), '64 bits'),
    (pd.Series([2**70, 1], dtype=object), '64 bits'), (pd.to_datetime(['2003-01-01', '2003-01-02']), 'unusable'),
    (['a', None], 'user is empty'), (['a', ''], 'user is empty.*row 1'), (pd.array([1, None], dtype='Int64'), 'user is empty.*row 1'),
    (['a', 'b\0'], 'NUL')])
def test_unusable_ids_of_a_frame(users, message):
    with pytest.raises(DataError, match=message): read(pd.DataFrame(dict(user=users, item=[1, 2])))

def test_missing_integers_of_parquet(tmp_path):
    pd.DataFrame(dict(user=pd.array([2**53 + 1, None] + [3] * 200, dtype='Int64'), item=1)).to_parquet(tmp_path/'a.parquet')
    with pytest.raises(DataError, match='user is empty.*row 1'): read(tmp_path/'a.parquet')
    assert read(tmp_path/'a.parquet', on_bad='drop').users.tolist() == [3, 2**53 + 1]

def test_ids_without_rows_are_forgotten(tmp_path):
    x = read(put(tmp_path/'a.csv', lines(bad={50: f'777,888,yesterday'})), on_bad='drop')
    assert 777 not in x.users and 888 not in x.items and x.user.max() == len(x.users) - 1

# times

@pytest.mark.parametrize('times,unit,want', [
    (['978300760', '978300761'], 's', [T, T + 1]), (['978300760123', '978300761000'], 'ms', [978300760123, 978300761000]),
    (['978300760000', '978300761000'], 'ms', [978300760000, 978300761000]),            # a finer unit keeps its integers
    (['978300760123456'], 'us', [978300760123456]), (['978300760123456789'], 'ns', [978300760123456789]),
    (['978300760.0', '978300761.0'], 's', [T, T + 1]), (['9.78300760e8'], 's', [T]), (['978300760.25', '978300761'], 'ms', [978300760250, 978300761000]),
    (['978300760.123456'], 'us', [978300760123456]),
    (['2000-12-31', '2001-01-01'], 's', [978220800, 978307200]), (['2000-12-31 22:12:40'], 's', [T]), (['2000-12-31T22:12:40Z'], 's', [T]),
    (['2000-12-31T22:12:40.5', '2000-12-31T22:12:41'], 'ms', [978300760500, 978300761000]), (['2001-01-01T00:12:40+02:00'], 's', [T]),
    (['2000-12-31T22:12:40.123456789'], 'ns', [978300760123456789])])
def test_units(times, unit, want, tmp_path):
    text = read(put(tmp_path/'a.csv', csv(pd.DataFrame(dict(user=1, item=range(len(times)), time=times)))))
    frame = read(pd.DataFrame(dict(user=1, item=range(len(times)), time=times)))
    for x in (text, frame): assert x.time.dtype == np.int64 and x.time.tolist() == want and x.unit == unit
    assert f'unit {unit}' in str(text.report)

@pytest.mark.parametrize('times', [
    pd.to_datetime([T, T + 1], unit='s'), pd.to_datetime([T, T + 1], unit='s').astype('datetime64[ms]'),
    pd.to_datetime([T, T + 1], unit='s', utc=True).tz_convert('Asia/Tokyo'), [float(T), T + 1.], pd.array([T, T + 1], dtype='Int64'),
    [datetime.fromtimestamp(T + k, timezone.utc) for k in (0, 1)], pd.Series([T, T + 1], dtype=object)], ids=range(7))
def test_typed_times(times):
    x = read(pd.DataFrame(dict(user=1, item=[1, 2], time=times)))
    assert x.time.tolist() == [T, T + 1] and x.unit == 's' and x.time.dtype == np.int64

@pytest.mark.parametrize('times,message', [
    ([1, 2, 3], 'of no unit'), ([0, 0, 0], 'of no unit'), ([-1, -2, T], 'of no unit'), ([20031224, 20031225, 20040101], 'dates or seconds'),
    (['03/04/05', '03/04/06', '01/01/01'], 'not understood'), (['monday', 'tuesday', 'x'], 'not understood'),
    (['2003-12-24 10:00', '2003-12-24 10:00Z', '2003-12-25 10:00'], 'zone'), ([True, False, True], 'boolean'),
    ([1.5e18, 1.6e18, 1.7e18], r'2\*\*53'), (['2003-13-45', '2003-12-01', '2003-12-02'], 'time is not a date'),
    ([None, T, T], 'time is empty'), ([T, None, T + 1.5], 'time is empty'), ([T, T + 1, T * 1000], 'looks like ms'), ([T, 0, T], 'time is 0')])
def test_ambiguous_times(times, message, tmp_path):
    df = pd.DataFrame(dict(user=1, item=1, time=times))
    with pytest.raises(DataError, match=message): read(df)
    if message != 'boolean':
        with pytest.raises(DataError, match=message): read(put(tmp_path/'a.csv', csv(df)))

@pytest.mark.parametrize('unit', ['s', 'day', 'order'])
def test_a_stated_unit_is_believed(unit):
    x = read(pd.DataFrame(dict(user=1, item=1, time=[3, 0, -2])), unit=unit)
    assert x.time.tolist() == [3, 0, -2] and x.unit == unit and x.order.tolist() == [2, 1, 0]
    assert any('negative' in n for n in x.report.notes) == (unit == 's')

def test_arrays_are_our_own(tmp_path):
    "Writable, and no view of the caller's frame"
    df = DF.copy()
    x, before = read(df), read(DF).fingerprint
    df.loc[:, 'timestamp'] += 1
    assert x.fingerprint == before
    for y in (x, read(put(tmp_path/'a.csv', csv()))): assert all(c.flags.writeable and c.flags.owndata for c in y.columns.values())

def test_wrong_unit():
    with pytest.raises(DataError, match='use one of'): read(DF, unit='minutes')
    with pytest.raises(DataError, match='are dates'): read(DF.assign(timestamp=pd.to_datetime(DF.timestamp, unit='s')), unit='s')

def test_future_is_noted():
    later = int((datetime.now(timezone.utc) + timedelta(days=900)).timestamp())
    x = read(pd.DataFrame(dict(user=1, item=1, time=[T, later])))
    assert len(x) == 2 and any('1 times lie after today' in n for n in x.report.notes)

# order, fingerprint, duplicates, report

def many(seed=0, n=400):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(user=rng.integers(0, 20, n), item=rng.integers(0, 50, n), time=T + rng.integers(0, 60, n), rating=rng.integers(1, 6, n)))

def test_order_is_user_time_row():
    df = many()
    x = read(df)
    want = df.assign(row=range(len(df))).sort_values(['user', 'time', 'row']).row
    assert x.order.tolist() == want.tolist() and x.report.rule == 'user-time-row'

def test_fingerprint_ignores_the_order_of_users_only():
    df = many()
    x, groups = read(df), [g for _, g in df.groupby('user')]
    for seed in range(3):
        shuffled = pd.concat([groups[i] for i in np.random.default_rng(seed).permutation(len(groups))])
        assert read(shuffled).fingerprint == x.fingerprint
    assert read(df.sort_values('time', kind='stable')).fingerprint == x.fingerprint, 'users interleaved'
    assert read(df[::-1]).fingerprint != x.fingerprint, 'ties were turned round'

@pytest.mark.parametrize('change', [dict(time=1), dict(rating=1), dict(item=1), dict(user=1)])
def test_fingerprint_sees_every_cell(change):
    df = many()
    (column, by), = change.items()
    other = df.copy(); other.loc[7, column] += by
    assert read(other).fingerprint != read(df).fingerprint

def test_fingerprint_sees_unit_type_and_missing_columns():
    df = many()
    prints = {read(d, **kw).fingerprint for d, kw in [
        (df, {}), (df.drop(columns='rating'), {}), (df.drop(columns='time'), {}), (df.assign(item=df.item.astype(str)), {}),
        (df.assign(time=df.time * 1000), {}), (df.iloc[:-1], {}), (df, dict(unit='day'))]}
    assert len(prints) == 7
    assert read(df).fingerprint == read(df, name='other', titles={1: 'x'}).fingerprint

def test_fingerprint_is_stable():
    "A constant: results of earlier versions name it"
    assert read(DF).fingerprint == FINGERPRINT

def test_duplicates_and_dedupe():
    df = many(n=300)
    df = pd.concat([df, df.iloc[[3, 3, 50]]])
    known = int(df.duplicated().sum())
    x, y = read(df), read(df, dedupe=True)
    assert x.report.duplicates == known >= 3 and len(x) == 303 and 'dedupe=True' in str(x.report)
    assert len(y) == 303 - known and y.report.dropped == known and y.report.duplicates == 0
    assert y.fingerprint == read(df.drop_duplicates()).fingerprint

def test_report_counts():
    df = many()
    r = read(df, name='toy').report
    s = df.sort_values(['user', 'time'], kind='stable')
    gaps = s.groupby('user').time.diff().dropna()
    n = df.groupby('user').size()
    assert r.ties == int(df.duplicated(['user', 'time'], keep=False).sum())
    assert (r.kept, r.users, r.items, r.read, r.repaired, r.rejected) == (400, 20, df.item.nunique(), 400, 0, [])
    assert r.gaps['max'] == gaps.max() and abs(r.gaps['zero'] - (gaps == 0).mean()) < 1e-12
    assert abs(r.gaps['median'] - gaps.median()) <= 1 and abs(r.gaps['p95'] - gaps.quantile(.95)) <= 1
    assert (r.lengths['min'], r.lengths['max'], r.lengths['mean']) == (n.min(), n.max(), n.mean())
    assert r.lengths['short'] + r.lengths['medium'] + r.lengths['long'] == 20
    assert r.span == ('2000-12-31', '2000-12-31') and json.loads(json.dumps(r.to_dict()))['fingerprint'] == r.fingerprint

def test_report_reads_well(tmp_path):
    x = read(put(tmp_path/'a.csv', lines(bad={7: '7,9'})), on_bad='drop')
    text, md = str(x.report), x._repr_markdown_()
    assert text == repr(x) and text.startswith('a: 299 rows, 40 users, 17 items') and len(text.split('\n')) <= 14
    assert max(map(len, text.split('\n'))) < 140 and md.startswith('**a**: 299 rows') and md.count('\n| ') >= 7
    for word in ['separator ,', 'user = user', '1 rejected', 'line 7', 'unit s', 'user-time-row', 'fingerprint']: assert word in text and word in md

def test_where():
    x = read(DF, titles={10: 'ten', 99: 'no row'})
    y = x.where(x.rating >= 3)
    assert raw(y) == [r for r, v in zip(raw(x), DF.rating) if v >= 3] and y.items is x.items and y.titles == {10: 'ten'}
    assert y.report.users == 2 and 'a selection of 4 of 6 rows' in str(y.report) and y.fingerprint != x.fingerprint
    assert x.where(np.ones(len(x), bool)).fingerprint == x.fingerprint

def test_empty_table():
    x = read(DF.iloc[:0])
    assert len(x) == 0 and x.report.users == 0 and len(x.fingerprint) == 64 and '0 rows' in str(x)

def test_stated_titles(tmp_path):
    put(tmp_path/'movies.csv', 'movieId,title,genres\r\n7,"Seven, the (1995)",Crime\r\n10,Ten,\r\n11,Other,\r\n')
    assert read(DF, titles=tmp_path/'movies.csv').titles == {7: 'Seven, the (1995)', 10: 'Ten'}
    put(tmp_path/'x.item', 'item_id:token\tmovie_title:token_seq\trelease_year:token\n007\tBond\t1962\n')
    assert read_titles(tmp_path/'x.item') == {'007': 'Bond (1962)'}
    with pytest.raises(DataError, match='no title column'): read_titles(put(tmp_path/'y.csv', 'movieId,genre\n1,2\n'))

def test_memory_a_row():
    "2 GiB must do for 20 M rows: here 2 M in a child, of which the imports are taken off"
    out = subprocess.run([sys.executable, ROOT/'benchmarks'/'ingest.py', '2e6'], capture_output=True, text=True, check=True)
    r = json.loads(out.stdout)
    assert r['rows'] == 2_000_000 and r['peak_gib'] - r['imports_gib'] < .32, r

# real data

@needs_data
@pytest.mark.parametrize('file,n,users,items,unit', [
    ('ml-100k/u.data', 100_000, 943, 1_682, 's'), ('ml-1m/ratings.dat', 1_000_209, 6_040, 3_706, 's'),
    ('ml-latest-small/ratings.csv', 100_836, 610, 9_724, 's'), ('ml-1m/ml-1m_sasrec.txt', 999_611, 6_040, 3_416, 'order'),
    ('sequences/LastFM.txt', 52_551, 1_090, 3_646, 'order'), ('sequences/Beauty.txt', 198_502, 22_363, 12_101, 'order'),
    ('sequences/Sports_and_Outdoors.txt', 296_337, 35_598, 18_357, 'order'), ('sequences/ML-1M.txt', 999_611, 6_040, 3_416, 'order'),
    ('grocery/rechorus_grocery_train.csv', 121_892, 14_681, 8_687, 's'), ('timed/LastFM_with_dates.tsv', 52_551, 1_090, 3_646, 's'),
    ('amazon-beauty/beauty_bert4rec.txt', 353_962, 40_226, 54_542, 'order')])
def test_real_sets(file, n, users, items, unit, data_dir):
    if not (data_dir/file).exists(): pytest.skip(f'no {file}')
    x = read(data_dir/file)
    assert (len(x), len(x.users), len(x.items), x.unit) == (n, users, items, unit)
    assert x.report.rejected == [] and x.report.repaired == 0

@needs_data
def test_real_formats_agree(data_dir, tmp_path):
    "The copy in the PyPI wheel is u.data with a header: one fingerprint; ties as counted for the protocol"
    x = read(data_dir/'ml-100k'/'u.data', titles=data_dir/'ml-100k'/'u.item')
    head = b'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
    assert read(put(tmp_path/'ml-100k.inter', head + (data_dir/'ml-100k'/'u.data').read_bytes())).fingerprint == x.fingerprint
    assert round(x.report.ties / len(x), 3) == .758 and round(x.report.gaps['zero'], 2) == .51
    assert x.titles[1] == 'Toy Story (1995)' and len(x.titles) == 1_682

@needs_data
def test_real_rows_are_exact(data_dir):
    x = read(data_dir/'ml-1m'/'ratings.dat', titles=data_dir/'ml-1m'/'movies.dat')
    d = pd.read_csv(data_dir/'ml-1m'/'ratings.dat', sep=':', header=None, usecols=[0, 2, 4, 6], names=['u', '1', 'i', '2', 'r', '3', 't'])
    assert (x.users[x.user] == d.u).all() and (x.items[x.item] == d.i).all() and (x.time == d.t).all() and (x.rating == d.r).all()
    assert len(x.titles) == 3_706 and all(isinstance(t, str) for t in x.titles.values())
