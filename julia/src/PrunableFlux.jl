"""
Neural-network pruning in Flux: layers whose weights carry a mask, and the four choices that make a
pruning method, each a small type of its own.

| axis        | question                                    | choices                                               |
|:------------|:--------------------------------------------|:------------------------------------------------------|
| saliency    | how much does a weight matter?              | [`Magnitude`](@ref), [`RandomSaliency`](@ref)         |
| structure   | what competes with what?                    | [`Global`](@ref), [`Layerwise`](@ref)                 |
| schedule    | how much goes at each round?                | [`OneShot`](@ref), [`Constant`](@ref), [`Exponential`](@ref), [`Polynomial`](@ref), any vector |
| fine-tuning | what do the survivors restart from?         | [`Continue`](@ref), [`Rewind`](@ref), [`Reinitialize`](@ref), `nothing` |

[`prune!`](@ref) prunes once; [`iterative_prune!`](@ref) runs a whole experiment.
"""
module PrunableFlux

using ChainRulesCore: ChainRulesCore, NoTangent, ProjectTo, @thunk, unthunk
using Flux: Flux, Adam, Chain, DataLoader, Dense, glorot_uniform, logitcrossentropy, onecold, onehotbatch
using Functors: children, fmap, isleaf
using MLUtils: numobs
using NNlib: NNlib
using Optimisers: Optimisers
using PrecompileTools: @compile_workload, @setup_workload
using Random: Random, AbstractRNG, Xoshiro

export PrunableDense, prunable, unprunable, prunables, sparsity, density, mask!
export saliency, Magnitude, RandomSaliency
export Global, Layerwise
export sparsities, OneShot, Constant, Exponential, Polynomial
export Continue, Rewind, Reinitialize
export Training, train_masked!, evaluate
export prune!, iterative_prune!

include("layers.jl")
include("saliency.jl")
include("structure.jl")
include("schedule.jl")
include("training.jl")
include("finetune.jl")
include("experiment.jl")
include("precompile.jl")

end
