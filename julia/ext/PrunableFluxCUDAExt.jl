module PrunableFluxCUDAExt

using CUDA: CuArray
using PrunableFlux: PrunableFlux, mask!

# Looking for stray weights first would make the host wait for the device at every layer.
PrunableFlux.zero_pruned!(W::CuArray, M::CuArray{Bool}) = mask!(W, M)

end
