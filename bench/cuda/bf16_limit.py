import torch
a=torch.randn(8192,8192,device='cuda',dtype=torch.bfloat16);b=torch.randn(8192,8192,device='cuda',dtype=torch.bfloat16)
for _ in range(5): a@b
e=[torch.cuda.Event(enable_timing=True) for _ in range(22)]
for i in range(22):
    e[i].record()
    if i<21: a@b
torch.cuda.synchronize()
t=sorted(e[i].elapsed_time(e[i+1]) for i in range(21))[10]
print('torch bf16 8192^3: %.0f TFLOPS'%(2*8192**3/t*1e-9))
