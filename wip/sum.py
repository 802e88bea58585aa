import csv,sys,collections
for f in sys.argv[1:]:
    r=list(csv.DictReader(open(f)))
    for s in dict.fromkeys(x['setting'] for x in r):
        m=collections.OrderedDict((k,[]) for k in ('single','several','camera','articulated'))
        y=[x for x in r if x['setting']==s]
        for x in y: m[x['kind']].append(float(x['correlation']))
        al=[c for v in m.values() for c in v]
        print(f[-12:],s,len(y),{k:[round(c,2) for c in v] for k,v in m.items()},'mean',round(sum(al)/len(al),3),'fid',round(sum(float(x['fidelity']) for x in y)/len(y),3),'px',round(sum(float(x['error_px']) for x in y)/len(y),1),'c/g/s',*[sum(int(x[c]) for x in y) for c in ('colour_ok','background_ok','shape_ok','leak')])
