"""
    Neurons(; layerwise = false, norm = 1, exclude = (), min_kept = 0)

Whole neurons: their incoming and their outgoing weights; never the outputs of the last layer. They compete over the
whole network, or with `layerwise` within their layer; a sparsity is a share of neurons, and with `layerwise` may be one
per competing hidden layer. A neuron's score is the `norm` of the scores of its kept incoming weights, with
[`Magnitude`](@ref) the L1 or, with `norm = 2`, L2 norm of its weights (Li et al. 2017, arXiv:1608.08710), or what a criterion
about neurons gives. Of neurons some of whose weights are pruned already, more may go: those that are left without incoming or
without outgoing weights. [`compact`](@ref) then makes the network smaller.

The neurons of a convolution are its filters. For a `Chain` of prunable layers with, between them, parts that act on
each channel alone.

# Examples
```jldoctest
julia> model = Chain(PrunableDense(4 => 6, relu), PrunableDense(6 => 2));

julia> prune!(model, Magnitude(); sparsity = 0.5, structure = Neurons());

julia> compact(model)[1]
PrunableDense(4 => 3, relu; density=1.0)  # 15 parameters, plus 12 non-trainable
```
"""
Base.@kwdef struct Neurons
    layerwise::Bool = false
    norm::Float64 = 1
    exclude::Any = ()
    min_kept::Int = 0
    function Neurons(layerwise, norm, exclude, min_kept)
        1 <= norm < Inf || throw(ArgumentError("Neurons' norm must be at least 1, and finite, not $norm"))
        return new(layerwise, norm, exclude, min_kept)
    end
end

function competitors(::Neurons, masks)
    length(masks) > 1 || throw(ArgumentError("structure Neurons needs a model with at least two prunable layers"))
    return living(masks)
end

"""
    living(masks) -> Vector of Bool vectors

Which neurons of each hidden layer have both a kept incoming and a kept outgoing weight. The masks are
[`canonical`](@ref).
"""
living(masks) = [fed(mask) .& used(next, size(mask, 1)) for (mask, next) in zip(masks, masks[2:end])]

fed(mask) = vec(any(reshape(mask, size(mask, 1), :); dims = 2))
used(next, n) = vec(any(by_source(next, n); dims = (1, 2, 4)))

"""
The array of a layer that follows one with `n` outputs, as (outputs, places, n, kernel): after `Flux.flatten`, each of
the `n` channels fills several places.
"""
function by_source(next, n)
    size(next, 2) % n == 0 || throw(ArgumentError(
        "model must feed all outputs of a layer to the next, but $n outputs meet $(size(next, 2)) inputs"))
    return reshape(next, size(next, 1), size(next, 2) ÷ n, n, :)
end

group(structure::Neurons, units, layers) =
    group(structure.layerwise ? Layerwise() : Global(), units, layers)

function unit_scores(structure::Neurons, scores, masks)
    p = structure.norm
    return map(scores, masks, 1:(length(masks) - 1)) do score, mask, _
        if score isa AbstractVector
            length(score) == size(mask, 1) || throw(DimensionMismatch(
                "saliency must give one score per neuron, $(size(mask, 1)), not $(length(score))"))
            score
        else
            signed = ifelse.(mask, score .* abs.(Float64.(score)) .^ (p - 1), 0.0)
            total = vec(sum(reshape(signed, size(mask, 1), :); dims = 2))
            sign.(total) .* abs.(total) .^ (1 / p)
        end
    end
end

function to_masks(::Neurons, units, masks)
    new = map(copy, masks)
    for (l, (was, is)) in enumerate(zip(living(masks), units))
        gone = was .& .!is
        reshape(new[l], length(gone), :)[gone, :] .= false
        by_source(new[l + 1], length(gone))[:, :, gone, :] .= false
    end
    return new
end
