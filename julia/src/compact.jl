"""
    compact(model) -> Chain

The network without the neurons that do nothing, as smaller dense arrays; its outputs are the same to rounding. A
hidden neuron, or the filter of a convolution, goes if none of its outgoing weights is kept, or if none of its incoming
ones is: then it is the constant `σ(b)`, which the biases of the next layer take over (a layer without gets some, if the
constant is not 0). It stays if the next layer, or a pooling on the way, pads a constant that is not 0. One neuron of
each layer stays in any case. `BatchNorm` between the layers shrinks with them. What is left keeps its masks, and shares no
memory with `model`.

For a `Chain` of prunable layers with, between them, parts that act on each channel alone; it throws `ArgumentError`
for other models.

# Examples
```jldoctest
julia> model = Chain(PrunableDense(Dense([1.0 2; 0 0; 3 4], [0.0, 5, 0]), Bool[1 1; 0 0; 1 1]), PrunableDense([1.0 1 0]));

julia> model[2].mask[3] = false; small = compact(model);

julia> small[1], small[2]
(PrunableDense(2 => 1; density=1.0), PrunableDense(1 => 1; density=1.0))

julia> small([1.0, 1.0]) == model([1.0, 1.0])
true
```
"""
function compact(model)
    _, old = sequence(mask!(model))
    parts = Any[deepcopy(part) for part in old]
    places = findall(part -> part isa Prunable, parts)
    while any(((here, there),) -> shrink!(parts, here, there), zip(places, places[2:end])) end
    new = IdDict{Any,Any}(zip(old, parts))
    return fmap(x -> x isa Union{Prunable,BatchNorm} ? new[x] : x, model; exclude = x -> x isa BatchNorm || islayer(x))
end

"Remove what can go of the outputs of the layer at `here`, which feeds the one at `there`; return whether anything could."
function shrink!(parts, here, there)
    layer, next, between = parts[here], parts[there], parts[(here + 1):(there - 1)]
    masks = canonical(layer, layer.mask), canonical(next, next.mask)
    comes_in, goes_out = fed(masks[1]), used(masks[2], size(masks[1], 1))
    values, padded = constants(layer, between, next)
    keep = goes_out .& (comes_in .| padded)
    any(keep) || (keep[1] = true)
    all(keep) && return false
    kept_bias = bias(layer) === false ? false : bias(layer)[keep]
    select_outputs(A) = native(layer, canonical(layer, A)[rest(A, keep)...])
    parts[here] = rebuilt(layer, select_outputs(weight(layer)), select_outputs(layer.mask); bias = kept_bias)
    for i in (here + 1):(there - 1)
        parts[i] isa BatchNorm && (parts[i] = without_channels(parts[i], keep))
    end
    parts[there] = without_inputs(next, keep, ifelse.(keep' .| comes_in', 0, values))
    return true
end

pads(part) = false
pads(layer::PrunableConv) = any(!iszero, layer.conv.pad)
pads(pool::Flux.MeanPool) = any(!iszero, pool.pad)

"""
What the outputs of a layer are when they reach the next one, (places, outputs), where nothing comes in; and of which
outputs that is not so at the borders, since something on the way pads them when they are not 0.
"""
function constants(layer, between, next)
    n = size(canonical(layer, layer.mask), 1)
    values = reshape(inner(layer).σ.(bias(layer) .+ zeros(eltype(weight(layer)), n)), 1, n)
    padded = falses(n)
    for part in [between; next]
        if part isa BatchNorm
            values = repeat(values, part.chs ÷ length(values)) # after Flux.flatten a channel has several places
            values = reshape(Flux.testmode!(deepcopy(part))(reshape(values, 1, :, 1)), :, n)
        end
        pads(part) && (padded .|= vec(any(!iszero, values; dims = 1)))
    end
    return values, padded
end

function without_channels(norm::BatchNorm, keep)
    kept = repeat(keep; inner = norm.chs ÷ length(keep))
    part(v) = v isa AbstractVector ? v[kept] : v
    (; λ, β, γ, μ, σ², ϵ, momentum, affine, track_stats, active) = norm
    return BatchNorm(λ, part(β), part(γ), part(μ), part(σ²), ϵ, momentum, affine, track_stats, active, count(kept))
end

function without_inputs(layer, keep, constant)
    W = by_source(canonical(layer, weight(layer)), length(keep))
    kept(A) = native(layer, reshape(by_source(canonical(layer, A), length(keep))[:, :, keep, :],
                                    size(A, output_dim(layer)), :, size(canonical(layer, A))[3:end]...))
    shift = vec(sum(W .* reshape(constant, 1, size(constant)..., 1); dims = (2, 3, 4)))
    shifted = bias(layer) === false && all(iszero, shift) ? false : bias(layer) .+ shift
    return rebuilt(layer, kept(weight(layer)), kept(layer.mask); bias = shifted)
end

output_dim(::PrunableDense) = 1
output_dim(layer::PrunableConv) = ndims(layer.mask)
