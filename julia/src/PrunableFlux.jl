"""
Neural-network pruning in Flux: layers whose weights carry a mask, and the four choices that make a
pruning method, each a small type of its own.

| axis        | question                           | choices |
|:------------|:-----------------------------------|:--------|
| saliency    | how much does a weight matter?     | [`Magnitude`](@ref), [`Threshold`](@ref), [`Taylor`](@ref), [`SNIP`](@ref), [`GraSP`](@ref), [`Movement`](@ref), [`SynFlow`](@ref), [`OBD`](@ref), [`OBS`](@ref), [`Wanda`](@ref), [`EdgePopup`](@ref), [`RandomSaliency`](@ref); of neurons [`Activation`](@ref), [`Redundancy`](@ref) |
| structure   | what competes with what?           | [`Global`](@ref), [`Layerwise`](@ref), [`PerOutput`](@ref), [`ERK`](@ref), [`NofM`](@ref), [`Neurons`](@ref) |
| schedule    | how much goes at each round?       | [`OneShot`](@ref), [`Constant`](@ref), [`Exponential`](@ref), [`Polynomial`](@ref), [`Cosine`](@ref), any vector |
| fine-tuning | what do the survivors restart from? | [`Continue`](@ref), [`Rewind`](@ref), [`LearningRateRewind`](@ref), [`Reinitialize`](@ref), `nothing` |

[`prune!`](@ref) prunes once; [`iterative_prune!`](@ref) runs a whole experiment, [`gradual_prune!`](@ref) prunes inside one
training run, [`sparse_train!`](@ref) lets pruned weights grow again; [`compact`](@ref) makes a network without some of its
neurons smaller; [`sensitivity`](@ref) and [`lottery_ticket`](@ref) are experiments.
"""
module PrunableFlux

using ChainRulesCore: ChainRulesCore, NoTangent, ProjectTo, @thunk, unthunk
using Flux: Flux, Adam, BatchNorm, Chain, Conv, DataLoader, Dense, Zygote, glorot_uniform, logitcrossentropy, onecold,
            onehotbatch
using ForwardDiff: Dual, ForwardDiff, partials
using Functors: children, fmap, isleaf
using Base.BinaryPlatforms: CPUID
using LinearAlgebra: Adjoint, BLAS, I, Symmetric, Transpose, cholesky, diag, issuccess, mul!, tr
using MLUtils: MLUtils, numobs
using NNlib: NNlib
using Optimisers: Optimisers, AccumGrad, AdaBelief, AdaDelta, AdaGrad, AdaMax, AdamW, AMSGrad, ClipGrad, ClipNorm, Descent, Lion,
                  Momentum, NAdam, Nesterov, OAdam, OptimiserChain, RAdam, RMSProp, SignDecay, WeightDecay
using PrecompileTools: @compile_workload, @setup_workload
using Random: Random, AbstractRNG, Xoshiro
using SIMD: Vec, shufflevector, vifelse, vload, vstore

export PrunableDense, PrunableConv, prunable, unprunable, prunables, sparsity, density, mask!
export saliency, Magnitude, Threshold, RandomSaliency, Taylor, SNIP, GraSP, Movement, SynFlow, OBD, OBS, Wanda,
       Activation, Redundancy, EdgePopup
export Global, Layerwise, PerOutput, ERK, NofM, Neurons
export sparsities, OneShot, Constant, Exponential, Polynomial, Cosine
export Continue, Rewind, LearningRateRewind, Reinitialize
export Training, train_masked!, evaluate
export prune!, iterative_prune!, gradual_prune!, compact
export SET, RigL, regrow!, sparse_train!
export sensitivity, tolerable_rates, lottery_ticket
export sparsify

include("parallel.jl")
include("layers.jl")
include("conv.jl")
include("recurrent.jl")
include("conversion.jl")
include("models.jl")
include("training.jl")
include("saliency/saliency.jl")
include("saliency/magnitude.jl")
include("saliency/gradient.jl")
include("saliency/flow.jl")
include("saliency/curvature.jl")
include("saliency/activation.jl")
include("saliency/edgepopup.jl")
include("structure/selection.jl")
include("structure/neurons.jl")
include("schedule.jl")
include("finetune.jl")
include("experiment.jl")
include("regrow.jl")
include("compact.jl")
include("sensitivity.jl")
include("lottery.jl")
include("sparse/kernels.jl")
include("sparse/windows.jl")
include("sparse/single.jl")
include("sparse/sparsify.jl")
include("sparse/inference.jl")
include("sparse/training.jl")
include("precompile.jl")

end
