"""
    prunables(model) -> Vector

The [`Prunable`](@ref) layers of a model, each once, in the order in which they are reached depth first.
Their order is the order of layers wherever position counts.
"""
prunables(model) = unique(Prunable[m for m in Flux.modules(model) if m isa Prunable])

islayer(x) = x isa Union{Dense,Conv,Prunable} || isleaf(x)

"The model with `f(layer)` in the place of each prunable layer; tied layers stay tied."
function with_layers(f, model)
    new = IdDict(layer => f(layer) for layer in prunables(model))
    return fmap(x -> x isa Prunable ? new[x] : x, model; exclude = islayer)
end

"The model with other weights, and perhaps other masks, in its prunable layers."
function with_weights(model, weights, masks = map(layer -> layer.mask, prunables(model)))
    new = IdDict(zip(prunables(model), zip(weights, masks)))
    return with_layers(layer -> rebuilt(layer, new[layer]...), model)
end

weights(model) = map(weight, prunables(model))

"""
    sequence(model) -> (layers, parts)

The prunable layers of a model in which each feeds only the next, and all its parts in order: a layer, or a `Chain`, at any
depth, of prunable layers and, between them, parts that act on each channel alone.

Throws `ArgumentError` if there is anything else than prunable layers (without `groups`), `BatchNorm`, `Dropout`,
`identity`, pooling and `Flux.flatten`; if a layer occurs twice; or if there are no prunable layers.
"""
function sequence(model)
    parts = chained(model)
    layers = Prunable[part for part in parts if part isa Prunable]
    isempty(prunables(model)) && throw(ArgumentError("model has no prunable layers; prunable(model) makes them"))
    for part in parts
        part isa Union{PrunableDense,Between} || part === identity || part === Flux.flatten ||
            part isa PrunableConv && part.conv.groups == 1 ||
            throw(ArgumentError("model must be a Chain of prunable layers, BatchNorm, Dropout, pooling and flatten for this, \
                but holds $(sprint(show, part))"))
    end
    allunique(filter(part -> part isa Union{Prunable,BatchNorm}, parts)) ||
        throw(ArgumentError("model must not use a layer twice for this"))
    return layers, parts
end

const Between = Union{BatchNorm,Flux.Dropout,Flux.MaxPool,Flux.MeanPool,Flux.GlobalMaxPool,Flux.GlobalMeanPool,
                      Flux.AdaptiveMaxPool,Flux.AdaptiveMeanPool}

chained(model::Chain) = reduce(vcat, map(chained, collect(Any, model.layers)); init = Any[])
chained(part) = Any[part]

"The layers of a [`sequence`](@ref) of `PrunableDense` with nothing but `Dropout` between; it throws for others."
function perceptron(model)
    layers, parts = sequence(model)
    start = findfirst(part -> part isa Prunable, parts)
    for (i, part) in enumerate(parts)
        part isa Union{PrunableDense,Flux.Dropout} || part === identity || (i < start && part === Flux.flatten) ||
            throw(ArgumentError("model must be a Chain of PrunableDense for this, but holds $(sprint(show, part))"))
    end
    return layers
end

"""
    forward(model, x)

`model(x)`, in the way in which it is differentiated here: a `Chain` layer by layer, so that what Zygote compiles depends on
each layer alone, whatever is before and after it. A second network then costs no compilation for the layers of the first.
"""
forward(model, x) = model(x)
forward(model::Chain, x) = in_turn(model.layers, x)

in_turn(layers, x) = foldl((x, layer) -> layer(x), values(layers); init = x)

Zygote.@adjoint function in_turn(layers, x)
    parts = collect(Any, values(layers))
    pullbacks = similar(parts)
    for i in eachindex(parts)
        x, pullbacks[i] = Zygote._pullback(__context__, parts[i], x)
    end
    function in_turn_pullback(dx)
        slopes = similar(parts)
        for i in reverse(eachindex(parts))
            slopes[i], dx = isnothing(dx) ? (nothing, nothing) : pullbacks[i](unthunk(dx))
        end
        return like(layers, slopes), dx
    end
    return x, in_turn_pullback
end

like(::AbstractVector, parts) = parts
like(::Tuple, parts) = Tuple(parts)
like(::NamedTuple{names}, parts) where {names} = NamedTuple{names}(Tuple(parts))
