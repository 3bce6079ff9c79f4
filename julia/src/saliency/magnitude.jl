"""
    Magnitude(; scaled = false)

Score `|w|` (Janowsky 1989; Han, Pool, Tran & Dally 2015, arXiv:1506.02626). With `scaled`, divided by the root
mean square of the layer's kept weights, so that layers of different scale compete fairly.
"""
Base.@kwdef struct Magnitude
    scaled::Bool = false
end

saliency(criterion::Magnitude, model, data...) = map(prunables(model)) do layer
    criterion.scaled || return abs.(weight(layer))
    scores = abs.(Float64.(weight(layer)))
    rms = sqrt(sum(abs2, mask!(scores, layer.mask)) / max(1, count(layer.mask)))
    return iszero(rms) ? scores : scores ./ rms
end

"""
    Threshold(; q = 1, tau = nothing)

Keep where `|w| ≥ τ` (Han et al. 2015, arXiv:1506.02626): score `|w| / τ`, cut at 1. `τ` is `tau`, or `q` times the
standard deviation of the layer's kept weights where `tau` is `nothing`. Without a sparsity [`prune!`](@ref) prunes all
weights that score below 1; with one, the scores rank the weights.

# Examples
```jldoctest
julia> model = Chain(PrunableDense(Float32[0.1 -0.5; 0.3 0.05]));

julia> prune!(model, Threshold(tau = 0.2));

julia> model[1].mask
2×2 Matrix{Bool}:
 0  1
 1  0
```
"""
Base.@kwdef struct Threshold
    q::Float64 = 1
    tau::Union{Nothing,Float64} = nothing
    function Threshold(q, tau)
        0 <= q < Inf || throw(ArgumentError("Threshold's q must be at least 0, and finite, not $q"))
        isnothing(tau) || 0 <= tau < Inf || throw(ArgumentError("Threshold's tau must be at least 0, and finite, not $tau"))
        return new(q, tau)
    end
end

cutoff(::Threshold) = 1

function saliency(criterion::Threshold, model, data...)
    return map(prunables(model)) do layer
        W = Float64.(weight(mask!(layer)))
        n = max(1, count(layer.mask))
        spread = sqrt(sum(abs2, mask!(W .- sum(W) / n, layer.mask)) / n)
        τ = something(criterion.tau, criterion.q * spread)
        return iszero(τ) ? fill!(W, Inf) : abs.(W) ./ τ
    end
end

"""
    RandomSaliency(; seed = 0)

Score uniform on [0, 1): the baseline. The scores depend on nothing but the seed and the layers' sizes, so
that successive rounds follow one random order.
"""
Base.@kwdef struct RandomSaliency
    seed::Int = 0
end

function saliency(criterion::RandomSaliency, model, data...)
    rng = Xoshiro(criterion.seed)
    return [rand(rng, Float32, size(layer.mask)) for layer in prunables(model)]
end
