import torch, sys
import bitsandbytes as bnb, bitsandbytes.functional as F
from bitsandbytes import _library, _C
print(_library.libraries, _C.build_info())
torch.manual_seed(0)
ops=torch.ops.bitsandbytes
bad=0
for n in (1,2,15,16,17,255,256,257,1000,4097,8192,100003,1<<20):
    for dt in (torch.float32,torch.float16,torch.bfloat16):
        x=(torch.randn(n)*torch.exp(torch.randn(n)*4)).to(dt)
        if n>1000: x[5]=float('nan'); x[900:910]=float('inf'); x[960:962]=-float('inf'); x[64:800]=0
        for nm,code in (('s',F.create_dynamic_map()),('u',F.create_dynamic_map(False)),('l',F.create_linear_map()),('l4',F.create_linear_map(True,4))):
            for off in (0,1):
                y=x[off:]
                for bs in (32,64,128,256,512,1024,2048,4096):
                    a=ops.quantize_blockwise(y,code,bs); b=ops.quantize_blockwise(x.cuda()[off:],code.cuda(),bs)
                    if not torch.equal(a[0],b[0].cpu()) or not torch.equal(a[1].view(torch.int32),b[1].cpu().view(torch.int32)):
                        bad+=1
                        if bad<10: print('Q',n,dt,nm,bs,off,(a[0]!=b[0].cpu()).sum(),(a[1]!=b[1].cpu()).sum())
                    for bs2 in (bs,):
                        d=ops.dequantize_blockwise(a[0],a[1],code,bs,dt); e=ops.dequantize_blockwise(b[0],b[1],code.cuda(),bs,dt)
                        if not torch.equal(d.nan_to_num(7),e.cpu().nan_to_num(7)):
                            bad+=1
                            if bad<10: print('D',n,dt,nm,bs,off)
print('quant mismatches',bad)
for dt in (torch.float32,torch.bfloat16,torch.float16):
    for cls in (bnb.optim.Adam8bit,bnb.optim.AdamW32bit):
        sh=[(300,257),(100,),(4096,),(5000,),(1,),(33,1000)]
        pc=[torch.nn.Parameter((torch.randn(s)*.1).to(dt)) for s in sh]; pg=[torch.nn.Parameter(p.detach().cuda()) for p in pc]
        oc=cls(pc,lr=1e-2,weight_decay=.1); og=cls(pg,lr=1e-2,weight_decay=.1)
        for s in range(10):
            for a,b in zip(pc,pg):
                a.grad=(torch.randn_like(a)*torch.exp(torch.randn_like(a)*2)*1e-2); b.grad=a.grad.cuda()
            oc.step(); og.step()
        diff=max((a-b.cpu()).abs().max().item() for a,b in zip(pc,pg)); exact=sum((a!=b.cpu()).sum().item() for a,b in zip(pc,pg))
        st=sum((oc.state[a]['state1']!=og.state[b]['state1'].cpu()).sum().item()+(oc.state[a]['state2']!=og.state[b]['state2'].cpu()).sum().item() for a,b in zip(pc,pg))
        print(dt,cls.__name__,'param diff',diff,'params differing',exact,'states differing',st)
# int8
for m,k,n in ((1,64,32),(37,512,96),(100,333,77),(64,4096,128),(17,24,40)):
    for dt in (torch.float16,torch.bfloat16,torch.float32):
        A=torch.randn(m,k).to(dt); A[:,3]*=20
        for th in (0.,6.):
            a=ops.int8_vectorwise_quant(A,th); b=ops.int8_vectorwise_quant(A.cuda(),th)
            ok=all((u is None and v is None) or torch.equal(u,v.cpu()) for u,v in zip(a,b))
            if not ok: print('int8 quant differs',m,k,dt,th)
        B=ops.int8_vectorwise_quant(torch.randn(n,k),0.); 
        acc=ops.int8_linear_matmul(a[0],B[0]); accg=ops.int8_linear_matmul(b[0],B[0].cuda())
        if not torch.equal(acc,accg.cpu()): print('acc differs',m,k,n)
        if not torch.equal(acc, (a[0].double()@B[0].double().T).to(torch.int32)): print('acc wrong')
        bias=torch.randn(n).to(dt)
        o=ops.int8_mm_dequant(acc,a[1],B[1],dt,bias); og=ops.int8_mm_dequant(accg,b[1],B[1].cuda(),dt,bias.cuda())
        if not torch.equal(o,og.cpu()): print('dequant differs',m,k,n,dt,(o!=og.cpu()).sum())
print('int8 done')
# graph
p=[torch.nn.Parameter(torch.randn(5000,device='cuda')),torch.nn.Parameter(torch.randn(100,device='cuda'))]; q=[torch.nn.Parameter(v.detach().clone()) for v in p]
gr=[torch.randn_like(v) for v in p]
for v,w,g in zip(p,q,gr): v.grad=g.clone(); w.grad=g.clone()
o1=bnb.optim.Adam8bit(p,lr=1e-2); o2=bnb.optim.Adam8bit(q,lr=1e-2)
o1.step(); o2.step()
g=torch.cuda.CUDAGraph()
s=torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
with torch.cuda.graph(g): o1.step()
for i in range(5):
    for v,w in zip(p,q): t=torch.randn_like(v); v.grad.copy_(t); w.grad.copy_(t)
    g.replay(); o2.step()
torch.cuda.synchronize()
print('graph equal',[torch.equal(a,b) for a,b in zip(p,q)], o1.state[p[0]]['step'], o2.state[q[0]]['step'])
