"The report: its numbers against sums done by hand, its edges, and the page in a browser."
import base64, csv, functools, hashlib, io, json, os, re, shutil, socket, subprocess, tempfile, time, urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest
from qisal.core import BadInput, RunSpec, provenance, write_json
from qisal.report import (accuracy_table, after_table, cost_rows, differences, make_report, masking_table, newcombe_interval, paired_newcombe_interval, plot_after, plot_masking, read_maps, read_study, report_html,
                          resampled_area, run_command, setting_difference, saliency_grid, shipping_table, training_gain, verdicts, _labels)
from qisal.run import RESULTS_FORMAT, _seal, pack_correct, read_metrics
from qisal.worth import write_shipped

FRACS = [0, .1, .2, .3]
NASTY = '<img src=x onerror=alert(1)>&"\'{{ 7*7 }}</table>'

PROVENANCE = functools.cache(provenance)

def metrics(spec, acc, left=.5, n=1000, touched=False, **kw):
    "Made-up metrics in the layout of a run."
    curve = lambda *a, **k: dict(frac=FRACS, accuracy=[acc, *a], auc=float(np.trapezoid([acc, *a], FRACS)/(acc*.3)), **k)
    masking = dict(gradient=curve(left, left/2, left/4, fill='corner', order='morf'), random=curve(.9*acc, .8*acc, .7*acc, fill='corner', order='morf'))
    bits = 32 if spec.bits == '32' else int(re.search('[0-9]', spec.bits)[0])
    return dict(spec=spec.to_dict(), accuracy=acc, n_test=n, masking=masking, road=dict(morf={k: dict(v, fill='road') for k, v in masking.items()}, lerf={}),
        alphas=[] if bits == 32 else [dict(layer='1', bits=bits, alpha=5.5, clipped=.01, touched=touched)],
        cost=dict(weight_bits=1000*bits, weight_bytes=125*bits, bits_per_weight=float(bits), macs=10**6, bops=10**6*bits*bits, params=1000, layers=[]),
        timing=dict(training=60., total=100., n_threads=1), provenance=PROVENANCE(), code='0'*64, data=dict(x_train='a'*64)) | kw

def put(out, spec, m=None, error=None, maps=True):
    folder = Path(out)/'runs'/spec.run_id
    folder.mkdir(parents=True)
    write_json(folder/'spec.json', spec.to_dict())
    if m: write_json(folder/'metrics.json', _seal({'format': RESULTS_FORMAT, 'run_id': spec.run_id, **m, 'fingerprint': {}}))
    if error: write_json(folder/'error.json', error)
    if m and maps:
        g, b = np.random.default_rng(0), io.BytesIO()
        np.savez_compressed(b, images=g.integers(0, 256, (2, 9, 9, 1), dtype=np.uint8), labels=np.array([3, 4]), maps=g.normal(size=(2, 9, 9)).astype('float32'), pred=np.array([3, 5]))
        (folder/'maps.npz').write_bytes(b.getvalue())
    return folder

def study_of(tmp, *runs, **kw):
    for spec, m in runs: put(tmp/'s', spec, m, **kw)
    (tmp/'s'/'runs').mkdir(parents=True, exist_ok=True)
    return tmp/'s'

def grid(acc=lambda s: .98, left=lambda s: .5, seeds=(0,), bits=('32', '4'), n=1000):
    specs = [RunSpec(bits=b, guided=g, seed=s) for b in bits for g in (False, True) for s in seeds]
    return [(s, metrics(s, acc(s), left(s), n)) for s in specs]

AFTER = dict(theirs=-.001, **{'8': -.002, '4': -.01, '2': -.1})

def ship(out, spec, after=AFTER, slow=.5, differ=0, **kw):
    "Made-up measurements of a run's file; `after`: what quantizing afterwards costs."
    folder = Path(out)/'runs'/spec.run_id
    m, bits = read_metrics(folder), 32 if spec.bits == '32' else int(spec.bits[0])
    found = dict(accuracy=m['accuracy'], n_test=m['n_test'], differ=differ, others=0, load=.25, seconds=1., bits_per_weight=bits + .1, provenance={**PROVENANCE(), 'versions': dict(onnxruntime='9.9')})
    if bits == 32: found |= dict(kind='float', bytes=dict(onnx=4000, float_onnx=4000), calibration=512, after_training=[
        dict(by='onnxruntime' if b == 'theirs' else 'qisal', bits='8' if b == 'theirs' else b, accuracy=m['accuracy'] + v, bytes=1) for b, v in after.items()])
    else: found |= dict(kind='quantized', bytes=dict(onnx=125*bits, safetensors=120*bits, float_onnx=4000), latency=[dict(batch=n, threads=1, ratio=slow + (n > 1)*.1, low=slow - .05, high=slow + .2, ms=slow*f, float_ms=f, n=9) for n, f in ((1, .2), (256, 40.))])
    return write_shipped(folder, m, found | kw)

def shipped_study(tmp, runs, **kw):
    out = study_of(tmp, *runs)
    for s, _ in runs: ship(out, s, **kw)
    return out

# --- numbers ---

def test_one_seed_is_wilson_and_several_are_student(tmp_path):
    from scipy.stats import t
    one = accuracy_table(read_study(study_of(tmp_path/'a', *grid(lambda s: .95))))
    p, n, z = .95, 1000, 1.959964
    mid, half = (p + z*z/(2*n))/(1 + z*z/n), z/(1 + z*z/n)*np.sqrt(p*(1 - p)/n + z*z/(4*n*n))
    assert set(one.basis) == {'images'} and one.low[0] == pytest.approx(mid - half, abs=1e-6) and one.high[0] == pytest.approx(mid + half, abs=1e-6)
    accs = {0: .95, 1: .96, 2: .98}
    many = accuracy_table(read_study(study_of(tmp_path/'b', *grid(lambda s: accs[s.seed], seeds=(0, 1, 2)))))
    v = np.array(list(accs.values())); half = t.ppf(.975, 2)*v.std(ddof=1)/np.sqrt(3)
    assert set(many.basis) == {'seeds'} and len(many) == 4 and many.accuracy[0] == pytest.approx(v.mean())
    assert many.low[0] == pytest.approx(v.mean() - half) and many.high[0] == pytest.approx(min(v.mean() + half, 1))
    assert many.sd[0] == pytest.approx(v.std(ddof=1)) and many.seconds[0] == 100

def test_masking_table_by_hand(tmp_path):
    m = masking_table(read_study(study_of(tmp_path, *grid(lambda s: .9, lambda s: .4 if s.guided else .6))))
    assert m.left10.tolist() == [.6, .4, .6, .4] and m.left20.tolist() == [.3, .2, .3, .2]
    area = (.9 + .6)/2*.1 + (.6 + .3)/2*.1 + (.3 + .15)/2*.1
    control = ((.9 + .81)/2 + (.81 + .72)/2 + (.72 + .63)/2)*.1
    assert m.auc[0] == pytest.approx(area/(.9*.3)) and m.gap[0] == pytest.approx((control - area)/(.9*.3))

def test_newcombe_against_the_paper():
    assert newcombe_interval(56/70, 48/80, 70, 80)[1:] == pytest.approx((.0524, .3339), abs=1e-4)
    assert newcombe_interval(10/10, 0/10, 10)[1:] == pytest.approx((.6075, 1.), abs=1e-4)

def test_differences_pair_seeds_and_settings(tmp_path):
    acc = lambda s: .9 + .01*s.seed + (.02 if s.guided else 0) - (.05 if s.bits == '4' else 0)
    s = read_study(study_of(tmp_path, *[o for o in grid(acc, seeds=(0, 1, 2)) if not (o[0].guided and o[0].seed == 2)]))
    g = differences(s, 'guidance')
    assert g['mean'].tolist() == pytest.approx([.02, .02]) and g.seeds.tolist() == [2, 2]
    b = differences(s, 'bits')
    assert b.label.tolist() == ['4-bit', '4-bit, guided'] and b['mean'].tolist() == pytest.approx([-.05, -.05]) and b.seeds.tolist() == [3, 2]
    p = differences(s, 'plain')
    assert p.label.tolist() == ['float, guided', '4-bit', '4-bit, guided'] and p['mean'].tolist() == pytest.approx([.02, -.05, -.03])

def test_ablations_have_their_own_names_and_the_same_base(tmp_path):
    specs = [RunSpec(bits='4'), RunSpec(bits='4', guided=True, frac=.5), RunSpec(bits='4', guided=True, frac=.25)]
    s = read_study(study_of(tmp_path, *[(o, metrics(o, .9)) for o in specs]))
    assert set(s.table.label) == {'4-bit', '4-bit, guided, share masked 0.5', '4-bit, guided, share masked 0.25'}
    assert len(differences(s, 'guidance')) == 2
    assert _labels([RunSpec(bits='32').to_dict(), RunSpec(bits='4', weight_quantizer='dorefa').to_dict()]) == ['float', '4-bit']

def test_cost_rows(tmp_path):
    c = cost_rows(read_study(study_of(tmp_path, *grid())))
    assert c.bytes.tolist() == [4000, 500] and c['size'].tolist() == [1, 1/8] and c.work.tolist() == [1, 1/64]
    only4 = cost_rows(read_study(study_of(tmp_path/'b', *[o for o in grid() if o[0].bits == '4'])))
    assert len(only4) == 1 and np.isnan(only4['size'][0])

# --- paired by image ---

def answers(acc, left, control=.8, n=1000, seed=0, same=0):
    "Right or wrong as a run keeps it. `same` decides what networks share: how hard each image is."
    hard, g = np.random.default_rng(same).random(n), np.random.default_rng(1000 + seed)
    mixed = lambda share: hard + .05*g.normal(size=n) < share
    curve = lambda *shares: np.stack([mixed(acc) if i == 0 else mixed(o) for i, o in enumerate((acc, *shares))])
    first = curve(left, left/2, left/4)
    rows = {('gradient', 'corner', 'morf'): first, ('random', 'corner', 'morf'): curve(control, control*.9, control*.8)}
    rows |= {(a, 'road', o): v for (a, _, o), v in rows.items()}
    for v in rows.values(): v[0] = first[0]
    return first[0], rows

def answered(spec, right, rows, **kw):
    "Made-up metrics that agree with the answers."
    curve = lambda k: dict(frac=FRACS, accuracy=rows[k].mean(1).tolist(), auc=float(np.trapezoid(rows[k].mean(1), FRACS)/(rows[k][0].mean()*.3)), fill=k[1], order=k[2])
    return metrics(spec, right.mean(), n=len(right)) | dict(masking={a: curve((a, 'corner', 'morf')) for a in ('gradient', 'random')}, road=dict(morf={a: curve((a, 'road', 'morf')) for a in ('gradient', 'random')}, lerf={})) | kw

def put_answered(out, spec, old=False, **kw):
    right, rows = answers(**kw)
    raw = pack_correct(right, rows)
    folder = put(out, spec, answered(spec, right, rows) | ({} if old else dict(correct=hashlib.sha256(raw).hexdigest())))
    if not old: (folder/'correct.npz').write_bytes(raw)
    return right, rows

FLOAT, FOUR = RunSpec(), RunSpec(bits='4')

def test_no_images_have_no_interval():
    with pytest.raises(BadInput, match='no images to compare'): paired_newcombe_interval(0, 0, 0, 0)

def test_paired_newcombe_against_published_numbers():
    "Newcombe 1998: 36, 12, 2, 0. Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness of 21 children; complete response of 161 patients (their package's own test)."
    for table, low, high in (((36, 12, 2, 0), .0569, .3404), ((1, 1, 7, 12), -.507, -.026), ((59, 6, 16, 80), -.1186, -.0046)):
        d, *found = paired_newcombe_interval(*table)
        assert d == pytest.approx((table[1] - table[2])/sum(table)) and found == pytest.approx([low, high], abs=.0005 if abs(low) > .5 else 5e-5)

@pytest.mark.parametrize('table', [(1000, 0, 0, 0), (0, 0, 0, 1000), (0, 1000, 0, 0), (0, 0, 1000, 0), (1, 0, 0, 0), (0, 500, 500, 0), (500, 0, 0, 500)])
def test_paired_newcombe_at_the_edges(table):
    d, low, high = paired_newcombe_interval(*table)
    assert -1 <= low <= d <= high <= 1 and np.isfinite([low, high]).all()
    if sum(table) > 1: assert high - low < .2

def test_paired_newcombe_covers():
    "Of 4,000 simulated pairs of networks about 95 % of the intervals hold the true difference; the unpaired ones nearly all."
    p, n = np.array([.9, .05, .02, .03]), 400
    tables = np.random.default_rng(0).multinomial(n, p, 4000)
    paired = [paired_newcombe_interval(*map(int, t)) for t in tables]
    apart = [newcombe_interval((t[0] + t[1])/n, (t[0] + t[2])/n, n) for t in tables]
    cover = lambda found: np.mean([low <= .03 <= high for _, low, high in found])
    assert .94 < cover(paired) < .965 and cover(apart) > .985
    assert np.mean([h - l for _, l, h in apart]) > 1.2*np.mean([h - l for _, l, h in paired])

def test_bootstrap_of_an_area_covers():
    "The true area of 300 simulated curves lies in about 95 % of the intervals; the spread agrees with a linear expansion."
    n, held, p = 300, 0, np.array([.9, .6, .3])
    true = ((p[0] + p[1])/2 + (p[1] + p[2])/2)/(2*p[0])
    for i in range(300):
        right = np.random.default_rng(i).random(n) < p[:, None]  # nested: an image that is right masked is right whole
        areas = resampled_area(right, [0, .1, .2], 400)
        held += np.quantile(areas, .025) <= true <= np.quantile(areas, .975)
    assert .91 < held/300 < .985
    top, clean = (right[0]/4 + right[1]/2 + right[2]/4), right[0].astype(float)
    assert areas.std() == pytest.approx((top - top.mean()/clean.mean()*clean).std()/clean.mean()/n**.5, rel=.15)

def test_resampled_area_is_the_area_for_each_draw():
    right = np.random.default_rng(3).random((3, 50)) < np.array([.9, .5, .2])[:, None]
    import pandas as pd
    from qisal.metrics import masking_auc
    from qisal.report import _draws
    found = resampled_area(right, [0, .1, .4], 20)
    for w, area in zip(_draws(50, 20), found):
        again = np.repeat(right, w, axis=1)
        assert again.shape[1] == 50 and area == pytest.approx(masking_auc(pd.DataFrame(dict(frac=[0, .1, .4], accuracy=again.mean(1)))))
    assert (resampled_area(right, [0, .1, .4], 20) == found).all() and np.isnan(resampled_area(np.zeros((2, 9)), [0, .5], 5)).all()
    for bad in ((right[:1], [0]), (right, [0, .1]), (right, [.1, .2, .3])):
        with pytest.raises(BadInput): resampled_area(*bad)

def test_differences_of_one_seed_are_paired_by_image(tmp_path):
    (a, ra), (b, rb) = put_answered(tmp_path, FLOAT, acc=.95, left=.6), put_answered(tmp_path, FOUR, acc=.93, left=.7, seed=1)
    s = read_study(tmp_path)
    for value, x, y in (('accuracy', b, a), ('left10', rb['gradient', 'corner', 'morf'][1], ra['gradient', 'corner', 'morf'][1]), ('left20', rb['gradient', 'corner', 'morf'][2], ra['gradient', 'corner', 'morf'][2])):
        d = differences(s, 'bits', value).iloc[0]
        assert d.basis == 'paired' and (d['mean'], d.low, d.high) == pytest.approx(paired_newcombe_interval((x & y).sum(), (x & ~y).sum(), (~x & y).sum(), (~x & ~y).sum()))
        _, low, high = newcombe_interval(x.mean(), y.mean(), 1000)
        assert high - low > 1.3*(d.high - d.low)
    for value, fill in (('gap', 'corner'), ('road_gap', 'road')):
        d = differences(s, 'bits', value).iloc[0]
        gap = lambda r: resampled_area(r['random', fill, 'morf'], FRACS) - resampled_area(r['gradient', fill, 'morf'], FRACS)
        assert d.basis == 'paired' and (d.low, d.high) == pytest.approx(tuple(np.quantile(gap(rb) - gap(ra), [.025, .975]))) and d.low < d['mean'] < d.high
        m = masking_table(s).iloc[0]
        assert (m[f'{value}_low'], m[f'{value}_high']) == pytest.approx(tuple(np.quantile(gap(ra), [.025, .975])))
    page = report_html(s)
    assert 'paired by image' in page and 'They are paired by test image' in page and 'unpaired' not in page and 'a bootstrap over the test images' in page

def test_old_and_new_runs_are_never_paired(tmp_path):
    put_answered(tmp_path, FLOAT, acc=.95, left=.6, old=True)
    put_answered(tmp_path, FOUR, acc=.93, left=.7, seed=1)
    put_answered(tmp_path, replace(FOUR, guided=True), acc=.93, left=.3, seed=2)
    s = read_study(tmp_path)
    d = differences(s, 'plain')
    assert d.label.tolist() == ['4-bit', '4-bit, guided'] and d.basis.tolist() == ['images', 'images'] and differences(s, 'plain', 'gap').basis.tolist() == ['none', 'none']
    n = newcombe_interval(s.table.accuracy[1], s.table.accuracy[0], 1000)
    assert (d.low[0], d.high[0]) == pytest.approx(n[1:])
    assert differences(s, 'guidance').basis.tolist() == ['paired'] and differences(s, 'guidance', 'road_gap').basis.tolist() == ['paired']
    v = {o['name']: o for o in verdicts(s)}
    assert 'They are paired by test image' in v['maps']['caveat'] and 'They are unpaired' in v['bits']['caveat'] and 'signs without intervals' in v['maps at fewer bits']['text'] and 'signs' not in v['maps']['text']
    page = report_html(s)
    assert 'paired by image' in page and '>unpaired<' in page and '–: right or wrong of each image was not kept' in page

@pytest.mark.parametrize('damage,word', [(lambda p: p.unlink(), 'No such file'), (lambda p: p.write_bytes(b'PK'), 'altered')])
def test_answers_that_cant_be_used_are_named_and_nothing_is_paired_with_them(tmp_path, damage, word):
    for spec, acc in ((FLOAT, .95), (FOUR, .93)): put_answered(tmp_path, spec, acc=acc, left=.5)
    damage(tmp_path/'runs'/FOUR.run_id/'correct.npz')
    s = read_study(tmp_path)
    assert differences(s, 'bits').basis.tolist() == ['images']
    page = report_html(s)
    assert page.count(f'correct.npz of run {FOUR.run_id} can') == 1 and word in page

def test_one_open_gap_is_not_counted_as_growing(tmp_path):
    "The sign says yes in both; only one of the intervals does."
    for spec, left, n in ((FLOAT, .6, 1000), (replace(FLOAT, guided=True), .3, 1000), (FOUR, .6, 1000), (replace(FOUR, guided=True), .599, 1000)):
        put_answered(tmp_path, spec, acc=.95, left=left, n=n, seed=len(spec.bits) + spec.guided)
    s = read_study(tmp_path)
    d = differences(s, 'guidance', 'gap')
    assert d.low[0] > 0 and d.low[1] < 0 < d.high[1]
    v = {o['name']: o for o in verdicts(s)}['maps']
    assert 'grows in 1 of 2 (1 open) with constant fill' in v['text'] and v['verdict'] == 'holds in part' and set(v['gaps']) == {'constant fill', 'ROAD'}

def test_runs_on_other_test_images_are_neither_averaged_nor_compared(tmp_path):
    other = dict(x_test='b'*64)
    runs = [(FLOAT, metrics(FLOAT, .9) | dict(data=dict(x_test='a'*64))), (replace(FLOAT, seed=1), metrics(FLOAT, .5) | dict(data=other)), (FOUR, metrics(FOUR, .8) | dict(data=other))]
    for spec, m in runs: m['spec'] = spec.to_dict()
    s = read_study(study_of(tmp_path, *runs))
    acc = accuracy_table(s)
    assert acc.accuracy.tolist() == [.9, .5, .8] and acc.seeds.tolist() == [1, 1, 1] and len(set(acc.label)) == 3 and all('test images' in o for o in acc.label)
    assert not len(differences(s, 'bits')) and setting_difference(s.table[:1], s.table[2:], 'accuracy') is None
    assert 'tested on 2 different sets of images' in report_html(s)

def test_a_mean_over_seeds_with_a_hole_is_no_number(tmp_path):
    runs = grid(lambda s: .9, seeds=(0, 1), bits=('32',))
    runs[1][1]['masking']['gradient']['auc'] = None
    m = masking_table(read_study(study_of(tmp_path, *runs)))
    assert np.isnan(m.auc[0]) and np.isnan(m.gap[0]) and np.isfinite(m.auc[1]) and np.isfinite(m.left10[0])

def test_blank_maps_stand_beside_the_curve(tmp_path):
    runs = grid(bits=('32',))
    for (_, m), k in zip(runs, (612, 0)): m['masking']['gradient']['blank'] = k
    s = read_study(study_of(tmp_path, *runs))
    assert masking_table(s).blank.tolist() == [612, 0] and '612 of 1,000' in report_html(s)
    assert 'blank maps' not in report_html(read_study(study_of(tmp_path/'old', *grid(bits=('32',)))))

# --- verdicts: each turns with the numbers ---

def words(tmp, *runs): return {v['name']: v['verdict'] for v in verdicts(read_study(study_of(tmp, *runs)))}

def test_verdicts_follow_the_data(tmp_path):
    good = grid(lambda s: .98, lambda s: .3 if s.guided else .6, n=10000)
    assert words(tmp_path/'a', *good) == {'kept': 'holds here', 'guidance': 'holds here', 'maps': 'holds here', 'cost': 'holds here', 'bits': 'undecided', 'maps at fewer bits': 'undecided'}
    bad = grid(lambda s: .98 - .05*(s.bits == '4') - .05*s.guided, lambda s: .6 + .2*s.guided + .1*(s.bits == '4'), n=10000)
    assert words(tmp_path/'b', *bad) == {'kept': 'does not hold here', 'guidance': 'does not hold here', 'maps': 'does not hold here', 'cost': 'holds here', 'bits': 'holds here', 'maps at fewer bits': 'holds here'}
    few = grid(lambda s: .95, lambda s: .5, n=20)
    assert set(words(tmp_path/'c', *few).values()) == {'undecided', 'holds here'} and words(tmp_path/'d', *few)['kept'] == 'undecided'
    lone = [o for o in good if o[0].bits == '32' and not o[0].guided]
    assert set(words(tmp_path/'e', *lone).values()) == {'not tested'}
    split = grid(lambda s: .98, lambda s: .5 + (.2 if s.bits == '4' else -.2)*s.guided, n=10000)
    assert words(tmp_path/'f', *split)['maps'] == 'mixed'

def test_a_network_that_falls_to_any_masking_is_not_called_better_explained(tmp_path):
    def m(s):
        out = metrics(s, .98, .3 if s.guided else .6, 10000)
        if s.guided: out['masking']['random'] |= dict(accuracy=[.98, .2, .1, .1], auc=.2)  # guided: random order upsets it as well
        return out
    v = {v['name']: v for v in verdicts(read_study(study_of(tmp_path, *[(s, m(s)) for s, _ in grid()])))}['maps']
    assert v['verdict'] == 'holds by one measure' and 'grows in 0 of 2 with constant fill and in 2 of 2 with ROAD' in v['text']

def test_one_seed_is_said_to_be_one_seed(tmp_path):
    v = verdicts(read_study(study_of(tmp_path, *grid())))
    assert all('One seed' in o['caveat'] for o in v if o['evidence'] is not None)
    v = verdicts(read_study(study_of(tmp_path/'b', *grid(lambda s: .9 + s.seed/1000, seeds=(0, 1)))))
    assert all('over 2 seeds' in o['caveat'] for o in v if o['evidence'] is not None)

# --- the files ---

def test_shipping_table_by_hand(tmp_path):
    out = study_of(tmp_path, *grid(lambda s: .9 + s.seed/100, seeds=(0, 1)))
    for i, (s, _) in enumerate(grid(seeds=(0, 1))): ship(out, s, slow=.5 + s.seed/10, differ=s.seed)
    t = shipping_table(read_study(out))
    assert t.label.tolist() == ['float', 'float, guided', '4-bit', '4-bit, guided'] and t.runs.tolist() == [2]*4
    assert t['size'].tolist() == [1, 1, 1/8, 1/8] and t.file_bits.tolist() == [32.1, 32.1, 4.1, 4.1] and t.packed_size[2] == 480/4000 and np.isnan(t.packed_size[0])
    assert t.latency_1[2] == pytest.approx(.55) and t.latency_256[2] == pytest.approx(.65) and t.ms_256[2] == pytest.approx(22) and t.float_ms_1[2] == .2 and np.isnan(t.latency_1[0])
    assert t.differ.tolist() == [1]*4 and t.images.tolist() == [2000]*4 and t.file_accuracy[0] == pytest.approx(.905)

def test_after_table_pairs_seeds_guidance_and_bits(tmp_path):
    runs = grid(lambda s: .9 + s.seed/100 - .02*(s.bits == '4') - .03*(s.bits == '2') + .001*s.guided, seeds=(0, 1), bits=('32', '4', '2'))
    out = shipped_study(tmp_path, runs)
    a = after_table(read_study(out)).set_index(['guided', 'bits'])
    assert len(a) == 6 and a.label[False, '8'] == '8-bit' and a.label[True, '2'] == '2-bit, guided'
    for g in (False, True):
        assert a.float[g, '4'] == pytest.approx(.905 + .001*g) and a.trained[g, '4'] == pytest.approx(.885 + .001*g) and a.after[g, '2'] == pytest.approx(.805 + .001*g)
        assert a['mean'][g, '4'] == pytest.approx(-.01) and a['mean'][g, '2'] == pytest.approx(.07) and a.seeds[g, '2'] == 2 and a.basis[g, '2'] == 'seeds'
        assert np.isnan(a['mean'][g, '8']) and np.isnan(a.trained[g, '8']) and a.theirs[g, '8'] == pytest.approx(.904 + .001*g) and np.isnan(a.theirs[g, '4'])

def test_one_seed_of_files_has_newcombes_interval(tmp_path):
    a = after_table(read_study(shipped_study(tmp_path, grid(lambda s: .9 if s.bits == '32' else .88)))).set_index(['guided', 'bits'])
    d, low, high = newcombe_interval(.88, .89, 1000)
    assert (a['mean'][False, '4'], a.low[False, '4'], a.high[False, '4']) == pytest.approx((d, low, high)) and a.basis[False, '4'] == 'images'

def test_files_are_compared_image_by_image(tmp_path):
    from qisal.worth import pack_answers, unpack_answers
    g = np.random.default_rng(0)
    hard = g.random(1000)
    right = {k: hard + .02*g.normal(size=1000) < v for k, v in (('file', .88), ('4', .89), ('float', .9))}
    runs = [(s, metrics(s, float(right['float' if s.bits == '32' else 'file'].mean()))) for s in (FLOAT, FOUR)]
    out = study_of(tmp_path, *runs)
    four = dict(answers=pack_answers(right['file']))
    after = [dict(by='qisal', bits=b, accuracy=float(right['4'].mean()), answers=pack_answers(right['4'])) for b in ('8', '4', '2')] + [dict(by='onnxruntime', bits='8', accuracy=.9)]
    ship(out, FLOAT, after_training=after, answers=pack_answers(right['float'])); ship(out, FOUR, **four)
    a = after_table(read_study(out)).set_index('bits')
    x, y = right['file'], right['4']
    assert a.basis['4'] == 'paired' and (a.low['4'], a.high['4']) == pytest.approx(paired_newcombe_interval((x & y).sum(), (x & ~y).sum(), (~x & y).sum(), (~x & ~y).sum())[1:])
    gain = training_gain(read_study(out))
    assert 'They are paired by test image' in gain['caveat'] and len(pack_answers(np.ones(10000))) < 1700
    ship(out, FOUR)  # measured by an earlier version: nothing to pair with
    assert after_table(read_study(out)).set_index('bits').basis['4'] == 'images'
    assert unpack_answers(dict(accuracy=.5, answers=pack_answers(right['4'])), 1000) is None and unpack_answers(dict(accuracy=.5, answers=pack_answers(right['4'])), 999999) is None

def test_training_gain_follows_the_data(tmp_path):
    def gain(name, acc, after, bits=('32', '4')): return training_gain(read_study(shipped_study(tmp_path/name, grid(acc, n=10000, bits=bits), after=after)))
    keeps = lambda s: .95
    up = gain('a', keeps, AFTER | {'4': -.1})
    assert up['verdict'] == 'holds here' and 'ahead in 2 of 2 comparisons' in up['text'] and 'At 4 bits it brings +10.0 points' in up['text'] and '−0.10' in up['text'] and 'One seed' in up['caveat']
    down = gain('b', keeps, AFTER | {'4': .04})
    assert down['verdict'] == 'does not hold here' and 'ahead in 0 of 2 comparisons, behind in 2' in down['text']
    assert gain('c', keeps, AFTER | {'4': 0.})['verdict'] == 'undecided'
    none = gain('d', keeps, AFTER, bits=('32',))
    assert none['verdict'] == 'not tested' and 'nothing to compare' in none['text'] and none['caveat'] == ''

def test_measured_times_enter_the_verdict_on_cost(tmp_path):
    cost = lambda out: {v['name']: v for v in verdicts(read_study(out))}['cost']
    fast, slow, counted = shipped_study(tmp_path/'a', grid()), shipped_study(tmp_path/'b', grid(), slow=1.3), study_of(tmp_path/'c', *grid())
    assert cost(fast)['verdict'] == 'holds here' and '1/8.0 to 1/8.0 of its bytes' in cost(fast)['text'] and '0.50 times its time with one image, 0.60 times with 256' in cost(fast)['text']
    assert cost(slow)['verdict'] == 'holds in part' and 'Slower than the float file: 4-bit (MNIST, small CNN)' in cost(slow)['text']
    assert cost(counted)['verdict'] == 'holds here' and 'onnxruntime' not in cost(counted)['text'] and 'not a run time' in cost(counted)['caveat']

def test_a_study_that_was_not_measured_says_so(tmp_path):
    out = study_of(tmp_path, *grid())
    page = make_report(out).read_text(encoding='utf-8')
    assert 'id="ships"' in page and 'were not measured as files' in page and '--measure' in page and 'id="after"' not in page and 'shipped.json' not in page and not (out/'figures'/'after.png').exists()
    s = read_study(out)
    assert not len(shipping_table(s)) and not len(after_table(s)) and training_gain(s) is None
    with pytest.raises(BadInput, match='--measure'): plot_after(s)

def test_measured_in_part_and_failed_measurements_are_named(tmp_path):
    out = study_of(tmp_path, *grid())
    specs = [s for s, _ in grid()]
    ship(out, specs[0]); ship(out, specs[2])
    m = read_metrics(out/'runs'/specs[1].run_id)
    write_shipped(out/'runs'/specs[1].run_id, m, dict(error=dict(type='BadInput', message=NASTY)))
    page = make_report(out).read_text(encoding='utf-8')
    assert 'MNIST, small CNN, float, guided, seed 0: could not be measured: &lt;img' in page and NASTY not in page and 'Not measured yet, or without a model folder: MNIST, small CNN, 4-bit, guided, seed 0.' in page
    assert shipping_table(read_study(out)).label.tolist() == ['float', '4-bit'] and (out/'figures'/'after.png').stat().st_size > 5000
    assert [r['error'][:22] for r in csv.DictReader((out/'summary.csv').open()) if r['error']] == ['not measured as a file']

def test_measurements_of_other_metrics_are_not_shown(tmp_path):
    out = shipped_study(tmp_path, grid())
    folder = out/'runs'/RunSpec().run_id
    write_json(folder/'metrics.json', _seal({**read_metrics(folder), 'accuracy': .5}))
    s = read_study(out)
    assert [o['run_id'] for o in s.having('done') if not o['shipped']] == [RunSpec().run_id]

def test_ablations_are_compared_with_the_same_float_network(tmp_path):
    runs = grid() + [(s, metrics(s, .9)) for s in (RunSpec(bits='4', weight_quantizer='dorefa'),)]
    a = after_table(read_study(shipped_study(tmp_path, runs)))
    four = a[(a.bits == '4') & ~a.guided]
    assert len(four) == 2 and four.after.nunique() == 1 and sorted(four.trained) == [.9, .98]
    plot_after(read_study(tmp_path/'s'))

def test_the_time_note_says_what_was_going_on(tmp_path):
    assert 'no other run of this study was going on; load' in make_report(shipped_study(tmp_path/'a', grid())).read_text(encoding='utf-8')
    assert 'up to 2 other runs of this study were going on' in make_report(shipped_study(tmp_path/'b', grid(), others=2, load=None)).read_text(encoding='utf-8')

@pytest.mark.parametrize('name', ['first', 'modes'])
def test_committed_studies_still_have_a_report(name):
    from checkout import ROOT
    if not (ROOT/'reports'/name).is_dir(): pytest.skip('not in this checkout')
    s = read_study(ROOT/'reports'/name)
    page = report_html(s)
    assert 'id="ships"' in page and 'id="accuracy"' in page and not s.notes
    if not (s.runs[0]['folder']/'correct.npz').exists(): assert all(set(d.basis) <= {'images', 'seeds'} for d in map(functools.partial(differences, s), ('guidance', 'bits', 'plain')) if len(d))

# --- folders as they come ---

def test_no_study_is_bad_input(tmp_path):
    (tmp_path/'file').write_text('', encoding='utf-8'); (tmp_path/'empty').mkdir()
    for name in ('nowhere', 'file', 'empty'):
        with pytest.raises(BadInput): make_report(tmp_path/name)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['empty', 'file'] and not list((tmp_path/'empty').iterdir())

def test_other_format_is_refused(tmp_path):
    out = study_of(tmp_path, *grid())
    write_json(out/'manifest.json', dict(format=RESULTS_FORMAT + 1))
    with pytest.raises(BadInput, match='format'): make_report(out)
    (out/'manifest.json').unlink()
    run = next((out/'runs').iterdir())/'metrics.json'
    run.write_text(json.dumps({**json.loads(run.read_text(encoding='utf-8')), 'format': 99}), encoding='utf-8')
    with pytest.raises(BadInput, match='format 99'): make_report(out)
    assert not (out/'report.html').exists()

def test_study_without_runs(tmp_path):
    page = make_report(study_of(tmp_path)).read_text(encoding='utf-8')
    assert 'has no run yet' in page and 'id="accuracy"' not in page and 'No run failed' in page

def test_only_failed_and_unfinished_runs(tmp_path):
    put(tmp_path/'s', RunSpec(), error=dict(type='TrainingFailed', message=NASTY, epoch=3, cell=7))
    put(tmp_path/'s', RunSpec(bits='4'))
    page = make_report(tmp_path/'s').read_text(encoding='utf-8')
    assert 'nothing to show but the failures' in page and '&lt;img src=x' in page and NASTY not in page and '<img src=x' not in page
    assert 'mnist-small_cnn-b4-plain-s0' in page and 'TrainingFailed' in page and not (tmp_path/'s'/'figures').exists()

@pytest.mark.parametrize('change', [dict(road=None), dict(alphas=[]), dict(timing={}), dict(provenance={}), dict(data={}), dict(masking={}),
    dict(masking=dict(random=dict(frac=[0, .5], accuracy=[.9, .8], auc=None))), dict(masking=dict(gradient=dict(frac=[0], accuracy=[.9], auc=None)))])
def test_one_run_with_less_in_it(tmp_path, change):
    s = RunSpec(bits='2', guided=True)
    page = make_report(study_of(tmp_path, (s, metrics(s, .9) | change))).read_text(encoding='utf-8')
    assert '2-bit, guided' in page and 'nan' not in re.sub(r'base64,[\w+/=]*', '', page).lower().split('<main>')[1]

def test_altered_metrics_are_not_believed(tmp_path):
    out = study_of(tmp_path, *grid())
    path = out/'runs'/RunSpec().run_id/'metrics.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"accuracy": 0.98', '"accuracy": 0.99', 1), encoding='utf-8')
    s = read_study(out)
    assert len(s.table) == 3 and [o['run_id'] for o in s.having('partial')] == [RunSpec().run_id]

def test_damaged_maps_are_named_and_the_report_goes_on(tmp_path):
    out = study_of(tmp_path, *grid())
    runs = [out/'runs'/o[0].run_id/'maps.npz' for o in grid()]
    runs[0].write_bytes(b'PK\x03\x04 cut'); runs[1].unlink()
    np.savez(runs[2].open('wb'), images=np.zeros((2, 9, 9, 1), 'uint8'), labels=np.zeros(2), maps=np.zeros((2, 8, 8)), pred=np.zeros(2))
    for i, word in ((0, "can't be read"), (2, 'unexpected shapes')):
        with pytest.raises(BadInput, match=word): read_maps(runs[i].parent)
    g = saliency_grid(read_study(out), 'mnist')
    assert len(g['columns']) == 1 and len(g['notes']) == 3
    runs[3].unlink()
    assert saliency_grid(read_study(out), 'mnist')['columns'] == [] and 'kept no maps' in make_report(out).read_text(encoding='utf-8')

def test_classes_of_a_folder_have_their_names(tmp_path):
    s = RunSpec(dataset='folder:/data/x')
    names = lambda out: [r['true'] for r in saliency_grid(read_study(out), s.dataset)['rows']]
    classes = ['a', '$$', 'c', '<b>', '数', 'f']
    assert names(study_of(tmp_path/'a', (s, metrics(s, .9, classes=classes)))) == ['<b>', '数'] and names(study_of(tmp_path/'old', (s, metrics(s, .9)))) == ['3', '4']
    assert '&lt;b&gt;' in report_html(read_study(tmp_path/'a'/'s'))

def test_maps_that_hold_pickles_are_not_opened(tmp_path):
    out = study_of(tmp_path, *grid()[:1])
    np.savez((out/'runs'/RunSpec().run_id/'maps.npz').open('wb'), images=np.array([object()]), labels=0, maps=0, pred=0)
    with pytest.raises(BadInput, match="can't be read"): read_maps(out/'runs'/RunSpec().run_id)

def test_folder_that_cant_be_written(tmp_path, monkeypatch):
    out = study_of(tmp_path, *grid()[:1])
    import qisal.report as report
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(report, 'write_atomic', full)
    with pytest.raises(BadInput, match='No space left'): make_report(out)

def test_existing_summary_is_kept_and_the_page_rewritten(tmp_path):
    out = study_of(tmp_path, *grid()[:1])
    make_report(out)
    assert len(list(csv.DictReader((out/'summary.csv').open()))) == 1
    (out/'summary.csv').write_text('mine', encoding='utf-8')
    put(out, RunSpec(bits='4'), metrics(RunSpec(bits='4'), .9))
    assert '4-bit' in make_report(out).read_text(encoding='utf-8') and (out/'summary.csv').read_text(encoding='utf-8') == 'mine'
    assert (out/'figures'/'accuracy.png').stat().st_size > 5000 and (out/'figures'/'masking.png').stat().st_size > 5000

def test_no_machine_path_is_told(tmp_path, monkeypatch):
    out = study_of(tmp_path, *grid())
    assert str(tmp_path) not in make_report(out).read_text(encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    assert 'qisal run --spec s/runs/' in make_report('s').read_text(encoding='utf-8')
    assert run_command(read_study('s'), ['a b']) == "qisal run --spec 's/runs/a b/spec.json' --out again"

def test_commands_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = read_study(study_of(tmp_path, *grid(lambda s: .9 + s.seed/100, seeds=(0, 2)), *[(o, metrics(o, .9)) for o in (RunSpec(epochs=1, seed=e) for e in (0, 1))]).relative_to(tmp_path))
    said = [subprocess.run(['bash', '-c', 'qisal() { test -f "$3" && echo "$3"; }; ' + c], capture_output=True, text=True, check=True, encoding='utf-8').stdout.split() for c in accuracy_table(s).command]
    assert sorted(o for c in said for o in c) == sorted(f's/runs/{r}/spec.json' for r in s.table.run_id) and {len(c) for c in said} == {2}

def test_alpha_at_its_bound_is_said(tmp_path):
    s = RunSpec(bits='2')
    assert 'touched its lower bound' in make_report(study_of(tmp_path/'a', (s, metrics(s, .9, touched=True)))).read_text(encoding='utf-8')
    assert 'No alpha touched' in make_report(study_of(tmp_path/'b', (s, metrics(s, .9)))).read_text(encoding='utf-8')

def test_unmeasured_fill_is_bad_input(tmp_path):
    s = read_study(study_of(tmp_path, *[(s, m | dict(road=None)) for s, m in grid()]))
    with pytest.raises(BadInput, match='fill road'): plot_masking(s, 'road')

def test_names_are_text_in_figures_and_tables(tmp_path):
    "Dollars start no formula, and a name that looks like the page's own colours or ids is no colour and no id."
    name = '$$ $1_2$ #0173b2 id="x" <b>'
    specs = [RunSpec(dataset=f'folder:/data/{name}', guided=g) for g in (False, True)]
    page = make_report(out := study_of(tmp_path, *[(s, metrics(s, .9)) for s in specs])).read_text(encoding='utf-8')
    import html as h
    assert h.unescape(page).count(name) > 8 and name not in page and 'ould not be drawn' not in page
    assert (out/'figures'/'masking.png').stat().st_size > 5000
    p = Outline(); p.feed(page)
    assert not p.faults and not p.open and 'x' not in p.ids

def test_chinese_names_are_no_page_of_warnings(tmp_path, recwarn):
    s = RunSpec(dataset='folder:/data/数字 图片')
    assert '数字 图片' in report_html(read_study(study_of(tmp_path, (s, metrics(s, .9)))))
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]

def test_a_figure_that_cant_be_drawn_costs_nothing_else(tmp_path, monkeypatch):
    import qisal.report as report
    out = study_of(tmp_path, *grid())
    make_report(out)
    def no(*a, **k): raise RuntimeError('no ink <b>')
    monkeypatch.setattr(report, '_masking_panel', no)
    page = make_report(out).read_text(encoding='utf-8')
    assert 'Could not be drawn (RuntimeError: no ink &lt;b&gt;): figures/masking.png' in page and 'Could not be drawn (RuntimeError: no ink &lt;b&gt;): Masking curves on MNIST' in page
    assert (out/'figures'/'accuracy.png').exists() and not (out/'figures'/'masking.png').exists() and '>50.0<' in page

def test_legends_name_what_is_plotted(tmp_path):
    key = lambda page: [re.sub('<[^>]*>', '', o).strip() for o in re.findall(r'<li><svg viewBox="0 0 38 12".*?</svg>(.*?)</li>', page)]
    plain = report_html(read_study(study_of(tmp_path/'a', *[o for o in grid() if not o[0].guided])))
    assert set(key(plain)) == {'without guidance', 'gradient, without guidance', 'random order, without guidance'} and 'ROAD’s imputation' in plain and 'the image’s corner pixel' in plain
    both = report_html(read_study(study_of(tmp_path/'b', *[(s, m | dict(road=None)) for s, m in grid()])))
    assert {'with guidance', 'gradient, with guidance', 'random order, with guidance'} < set(key(both)) and 'Masked pixels get ROAD' not in both
    labels = {t.get_text() for f in (plot_masking(read_study(tmp_path/'a'/'s')),) for t in f.legends[0].get_texts()}
    assert labels == {'gradient, without guidance', 'random order, without guidance'}

def test_words_instead_of_codes(tmp_path):
    runs = grid(bits=('32', '4', 'w2a4')) + [(s, metrics(s, .9)) for s in (RunSpec(bits='4', arch='resnet20', mask_fill='mean', n_train=500),)]
    for s, m in runs: m['alphas'] = [dict(layer=o, bits=4, alpha=1., clipped=.1, touched=False) for o in ('2', '3.relu1', '14.input_quant')] if s.bits != '32' else []
    out = study_of(tmp_path, *runs)
    put(out, RunSpec(bits='2'), error=dict(type='E', message='m', epoch=None, cell=None))
    main = re.sub(r'<td class="code">.*?</td>|<svg class.*?</svg>|base64,[\w+/=]*|data:.*?"', '', report_html(read_study(out)), flags=re.S)
    for word in ('fp32', 'small_cnn', 'resnet20', 'corner<', 'b4-plain', 'Fill: ', 'layer 1', 'relu_'): assert word not in main.split('<main>')[1].replace('3.relu1', ''), word
    for word in ('small CNN', 'ResNet-20', '2-bit weights, 4-bit activations', 'training images 500', 'activation 2', 'input of 14', 'MNIST, small CNN, 2-bit, seed 0', 'test fills with the image’s mean'): assert word in main, word

# --- the page ---

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "A page with everything on it: two datasets, seeds, an ablation, a folder of images, a failure, an unfinished run."
    out = tmp_path_factory.mktemp('study')/'all'
    for d in ('mnist', 'fashion_mnist', 'folder:/data/cats & <dogs>'):
        for b in ('32', '4', '4/2', '2') if d == 'mnist' else ('32', '2'):
            for g in (False, True):
                for seed in (0, 1) if d == 'mnist' else (0,):
                    s = RunSpec(dataset=d, bits=b, guided=g, seed=seed)
                    put(out, s, metrics(s, .9 + seed/100, .3 if g else .5, touched=b == '2'))
                    if d != 'fashion_mnist' or not g: ship(out, s, slow=1.5 if b == '2' else .5)
    s = RunSpec(dataset='fashion_mnist', guided=True, frac=.25)
    put(out, s, metrics(s, .93))
    put(out, RunSpec(bits='8'), error=dict(type='TrainingFailed', message=NASTY, epoch=1, cell=2))
    put(out, RunSpec(bits='3'))
    write_json(out/'manifest.json', dict(format=RESULTS_FORMAT, commands=['qisal study --profile smoke'], specs={}, data={}, provenance={}))
    return make_report(out)

class Outline(HTMLParser):
    VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}
    def __init__(self): super().__init__(convert_charrefs=True); self.open, self.ids, self.refs, self.imgs, self.heads, self.faults = [], [], [], [], [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag not in self.VOID: self.open.append(tag)
        if 'id' in a: self.ids.append(a['id'])
        self.refs += [(tag, v) for k, v in attrs if k in ('href', 'src', 'xlink:href')]
        if tag == 'img': self.imgs.append(a)
        if tag == 'svg' and not ((a.get('role') == 'img' and a.get('aria-label')) or a.get('aria-hidden')): self.faults.append('svg without a text alternative')
        if re.fullmatch('h[1-6]', tag): self.heads.append(int(tag[1]))
    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); self.open.pop() if tag not in self.VOID else None
    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.faults.append(f'</{tag}> closes nothing')

def test_the_html_is_sound(page):
    p = Outline(); text = page.read_text(encoding='utf-8'); p.feed(text)
    assert not p.open and not p.faults
    assert len(p.ids) == len(set(p.ids))
    anchors = [v[1:] for _, v in p.refs if v.startswith('#')]
    assert anchors and set(anchors) <= set(p.ids)
    assert all(v.startswith(('#', 'data:', 'https://arxiv.org/')) for _, v in p.refs)
    assert p.imgs and all(i.get('alt') for i in p.imgs)
    assert p.heads[0] == 1 and all(b - a <= 1 for a, b in zip(p.heads, p.heads[1:]))
    assert '<script' not in text and '@import' not in text and 'url(http' not in text and NASTY not in text and '<dogs>' not in text

def test_downloads_hold_the_numbers(page):
    got = dict(re.findall(r'href="data:[\w/]+;base64,([\w+/=]+)" download="([\w.]+)"', page.read_text(encoding='utf-8')))
    got = {name: base64.b64decode(raw).decode() for raw, name in got.items()}
    assert set(got) == {'summary.csv', 'curves.csv', 'metrics.json', 'manifest.json', 'shipped.json'}
    assert json.loads(got['shipped.json'])[RunSpec().run_id]['bytes']['onnx'] == 4000
    assert len(list(csv.DictReader(io.StringIO(got['summary.csv'])))) == 27
    assert json.loads(got['metrics.json'])[RunSpec().run_id]['accuracy'] == .9
    rows = [r for r in csv.DictReader(io.StringIO(got['curves.csv'])) if r['run_id'] == RunSpec().run_id and r['attribution'] == 'gradient' and r['fill'] == 'corner']
    assert [float(r['accuracy']) for r in rows] == [.9, .5, .25, .125]

# --- in a browser ---

FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync '
         '--disable-default-apps --disable-extensions --disable-dev-shm-usage').split() + ['--host-resolver-rules=MAP * ~NOTFOUND']

def _browser(): return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'))), None)

class Browser:
    "Headless Chromium through chromedriver's own HTTP interface."
    def __init__(self, profile):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
        self.driver = subprocess.Popen([shutil.which('chromedriver'), f'--port={self.port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try: self.call('GET', '/status'); break
            except OSError: time.sleep(.1)
        options = dict(args=[*FLAGS, f'--user-data-dir={profile}'], perfLoggingPrefs=dict(enableNetwork=True))
        binary = _browser()
        if binary: options['binary'] = binary
        caps = {'browserName': 'chrome', 'goog:chromeOptions': options, 'goog:loggingPrefs': dict(browser='ALL', performance='ALL')}
        self.session = '/session/' + self.call('POST', '/session', dict(capabilities=dict(alwaysMatch=caps)))['sessionId']
        self.call('POST', f'{self.session}/url', dict(url='about:blank'))
    def call(self, method, path, body=None):
        r = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', method=method, headers={'Content-Type': 'application/json'}, data=None if body is None else json.dumps(body).encode())
        return json.load(urllib.request.urlopen(r, timeout=120))['value']
    def cdp(self, cmd, **params): return self.call('POST', f'{self.session}/goog/cdp/execute', dict(cmd=cmd, params=params))
    def open(self, path):
        self.call('POST', f'{self.session}/url', dict(url=Path(path).resolve().as_uri()))
        for _ in range(600):  # on a busy machine the driver may answer before the page is complete
            if self.js('return document.readyState') == 'complete': return
            time.sleep(.05)
    def js(self, script): return self.call('POST', f'{self.session}/execute/sync', dict(script=script, args=[]))
    def log(self, kind): return self.call('POST', f'{self.session}/se/log', dict(type=kind))
    def look(self, width, dark):
        self.cdp('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
    def close(self):
        try: self.call('DELETE', self.session)
        finally: self.driver.terminate(); self.driver.wait(20)

@pytest.fixture(scope='module')
def browser():
    if not (shutil.which('chromedriver') and _browser()):
        why = 'needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)'
        pytest.fail(why) if os.environ.get('CI') else pytest.skip(why)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        b = Browser(profile)
        yield b
        b.close()

def test_it_renders_without_complaint(browser, page):
    browser.look(1280, False)
    for kind in ('browser', 'performance'): browser.log(kind)  # what the browser did before
    browser.open(page)
    assert browser.js('return document.readyState') == 'complete'
    assert [o['message'] for o in browser.log('browser')] == []
    assert browser.js('return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)') == [] and browser.js('return document.images.length') >= 40
    assert browser.js("return [...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.hash)") == []
    assert browser.js("return [...document.querySelectorAll('a[download]')].map(a => a.href.split(',')[1].length > 40 ? '' : a.download).join('')") == ''
    assert browser.js('return window.pwned || document.querySelector("[onerror]")') is None
    asked = [json.loads(o['message'])['message'] for o in browser.log('performance')]
    urls = [o['params']['request']['url'] for o in asked if o['method'] == 'Network.requestWillBeSent']
    assert page.resolve().as_uri() in urls and [u for u in urls if not u.startswith(('file:', 'data:'))] == [] and len([u for u in urls if u.startswith('file:')]) == 1

@pytest.mark.parametrize('width,dark', [(1280, False), (1280, True), (390, False), (390, True), (320, False)])
def test_it_fits_and_can_be_read(browser, page, width, dark):
    browser.look(width, dark)
    browser.open(page)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.js('return document.documentElement.scrollWidth') <= width
    assert browser.js("return [...document.querySelectorAll('main p, main h2, main figure, main svg.plot')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent.slice(0, 40))") == []
    contrast = """const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x/255).map(x => x <= .04045 ? x/12.92 : ((x + .055)/1.055)**2.4); return .2126*v[0] + .7152*v[1] + .0722*v[2] };
      const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => q - p); return (x + .05)/(y + .05) };
      const paper = getComputedStyle(document.body).backgroundColor;
      const text = [...document.querySelectorAll('p, td, th, dd, dt, h2, figcaption, summary, a, small')].map(e => ratio(getComputedStyle(e).color, paper));
      const labels = [...document.querySelectorAll('svg.plot text')].map(e => ratio(getComputedStyle(e).fill, paper));
      const lines = [...document.querySelectorAll('svg.plot path')].map(e => getComputedStyle(e).stroke).filter(c => c.startsWith('rgb')).map(c => ratio(c, paper)).filter(r => r > 1.6);
      return [Math.min(...text), Math.min(...labels), Math.min(...lines), labels.length, lum(paper)]"""
    text, labels, lines, n, paper = browser.js(contrast)
    assert text >= 4.5 and labels >= 4.5 and lines >= 3 and n > 100 and (paper < .1) == dark

def test_wide_tables_scroll_in_their_own_box(browser, page):
    browser.look(390, False)
    browser.open(page)
    wide = browser.js("return [...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth + 1).map(b => [getComputedStyle(b).overflowX, b.tabIndex, b.getAttribute('aria-label')])")
    assert wide and all(o == 'auto' and t == 0 and label for o, t, label in wide)

def test_rows_are_low_on_a_phone_and_wide_tables_show_that_they_scroll(browser, page):
    browser.look(390, False)
    browser.open(page)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    rows = browser.js("return [...document.querySelectorAll('table:not(.maps) tbody tr')].filter(r => !r.querySelector('.wrap')).map(r => r.getBoundingClientRect().height)")
    assert len(rows) > 50 and max(rows) < 40
    cues = browser.js("return [...document.querySelectorAll('.box')].map(b => [b.scrollWidth > b.clientWidth + 1, getComputedStyle(b).backgroundImage.split('gradient').length - 1, getComputedStyle(b).backgroundAttachment])")
    assert any(wide for wide, _, _ in cues) and all((n, how) == (4, 'local, local, scroll, scroll') for _, n, how in cues)

def test_a_page_about_failures_renders_too(browser, tmp_path):
    put(tmp_path/'s', RunSpec(), error=dict(type='E', message=NASTY, epoch=None, cell=None))
    browser.look(390, True)
    browser.open(make_report(tmp_path/'s'))
    assert [o['message'] for o in browser.log('browser')] == [] and browser.js('return document.documentElement.scrollWidth') <= 390
    assert NASTY in browser.js('return document.body.innerText')

# --- the study as a notebook ---

def test_study_notebook(tmp_path):
    import nbformat
    from qisal.report import study_notebook
    out = study_of(tmp_path, *grid(lambda s: .9 + s.seed/100, seeds=(0, 1)))
    put(out, RunSpec(bits='8'), error=dict(type='TrainingFailed', message=NASTY, epoch=1, cell=2))
    text = study_notebook(out).read_text(encoding='utf-8')
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    assert str(tmp_path) not in text and 'papermill' not in nb.metadata and any('study = "s"' in c.source for c in nb.cells)
    code = [c for c in nb.cells if c.cell_type == 'code']
    assert all(c.execution_count for c in code) and not [o for c in code for o in c.outputs if o.output_type == 'error' or o.get('name') == 'stderr']
    assert '4-bit, guided' in text and 'TrainingFailed' in text

def test_study_notebook_needs_a_finished_run(tmp_path):
    from qisal.report import study_notebook
    with pytest.raises(BadInput, match='no finished run'): study_notebook(study_of(tmp_path))
    assert not (tmp_path/'s'/'study.ipynb').exists()
