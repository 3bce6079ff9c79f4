"""
    PrunableConv(size, in => out, σ = identity; kwargs...)
    PrunableConv(conv::Conv, [mask])

A `Flux.Conv` and a mask of the size of its weight, `(size..., in, out)`, in which `true` keeps. The forward pass
is that of the convolution with `weight .* mask`, whatever the weight holds where the mask is `false`, and the gradient of
the weight is masked. The keyword arguments are those of `Conv`, whose arrays the layer shares.

Throws `DimensionMismatch` if the sizes of mask and weight differ.

# Examples
```jldoctest
julia> layer = PrunableConv((5, 5), 1 => 6, relu);

julia> prune!(layer, Magnitude(); sparsity = 0.8);

julia> layer
PrunableConv((5, 5), 1 => 6, relu; density=0.2)  # 156 parameters, plus 150 non-trainable

julia> size(layer(rand(Float32, 28, 28, 1, 2)))
(24, 24, 6, 2)
```
"""
struct PrunableConv{C<:Conv,M<:AbstractArray{Bool}} <: Prunable
    conv::C
    mask::M
    function PrunableConv(conv::C, mask::M) where {C<:Conv,M<:AbstractArray{Bool}}
        size(mask) == size(conv.weight) || throw(DimensionMismatch(
            "mask must have the size of the weight, $(size(conv.weight)), not $(size(mask))"))
        return new{C,M}(conv, mask)
    end
end

PrunableConv(conv::Conv) = PrunableConv(conv, unpruned_mask(conv.weight))
PrunableConv(size::Tuple{Vararg{Integer}}, channels::Pair{<:Integer,<:Integer}, σ = identity; kwargs...) =
    PrunableConv(Conv(size, channels, σ; kwargs...))

Flux.@layer :noexpand PrunableConv trainable=(conv,)

inner(tree, ::PrunableConv) = tree.conv

function rebuilt(layer::PrunableConv, W, mask; bias = bias(layer), σ = layer.conv.σ)
    (; stride, pad, dilation, groups) = layer.conv
    return PrunableConv(Conv(W, bias, σ; stride, pad, dilation, groups), mask)
end

canonical(layer::PrunableConv, A) = permutedims(flipped(on_host(A)), ndims(A):-1:1)
native(layer::PrunableConv, A) = flipped(permutedims(A, ndims(A):-1:1))

flipped(W) = reverse(W; dims = ntuple(identity, ndims(W) - 2))

function Base.show(io::IO, layer::PrunableConv)
    text = sprint(show, layer.conv)
    print(io, "PrunableConv(", chop(text; head = 5), "; density=", round(density(layer); sigdigits = 3), ")")
    return nothing
end

function (layer::PrunableConv)(x::AbstractArray)
    (; σ, weight, bias, stride, pad, dilation, groups) = layer.conv
    return Conv(σ, masked(weight, layer.mask), bias, stride, pad, dilation, groups)(x)
end

"`W .* M`, without the copy: pruned weights that are not 0 are set to 0 in place."
masked(W, M) = zero_pruned!(W, M)

function ChainRulesCore.rrule(::typeof(masked), W, M)
    project = ProjectTo(W)
    masked_pullback(ȳ) = NoTangent(), @thunk(project(ifelse.(M, unthunk(ȳ), zero(eltype(W))))), NoTangent()
    return masked(W, M), masked_pullback
end
