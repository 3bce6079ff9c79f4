"""
    Prunable

A Flux layer with one weight array and a mask of its size, in which `true` keeps: [`PrunableDense`](@ref) or
[`PrunableConv`](@ref).
"""
abstract type Prunable end

"""
    PrunableDense(in => out, σ = identity; bias = true, init = glorot_uniform)
    PrunableDense(W::AbstractMatrix, [bias, σ])
    PrunableDense(dense::Dense, [mask])

A `Flux.Dense` and a mask of the size of its weight, `(out, in)`, in which `true` keeps. The forward pass is

    y = σ.((W .* mask) * x .+ bias)

whatever `W` holds where the mask is `false`, and the gradient of `W` is masked. The mask is any
`AbstractMatrix{Bool}` (a `Matrix{Bool}` unless one is given) and moves to the GPU with the layer; only
the dense part is trainable. The layer shares the arrays of the `Dense` it is made from.

A pruned weight is stored as exactly 0. Where something outside this package has changed one, the forward
pass sets it back to 0 in place: that is how it needs no masked copy of `W`.

Throws `DimensionMismatch` if the sizes of mask and weight differ, and `ArgumentError` if the weight is a transpose of other
memory, in which its mask would have no place.

# Examples
```jldoctest
julia> layer = PrunableDense(Dense([1.0 2.0; 3.0 4.0]), Bool[1 0; 1 1])
PrunableDense(2 => 2; density=0.75)  # 6 parameters, plus 4 non-trainable

julia> layer([1.0, 1.0])
2-element Vector{Float64}:
 1.0
 7.0
```
"""
struct PrunableDense{D<:Dense,M<:AbstractMatrix{Bool}} <: Prunable
    dense::D
    mask::M
    function PrunableDense(dense::D, mask::M) where {D<:Dense,M<:AbstractMatrix{Bool}}
        size(mask) == size(dense.weight) || throw(DimensionMismatch(
            "mask must have the size of the weight, $(size(dense.weight)), not $(size(mask))"))
        dense.weight isa Union{Transpose,Adjoint} && throw(ArgumentError(
            "the weight must be an array of its own, not the $(nameof(typeof(dense.weight))) of another; copy makes it one"))
        return new{D,M}(dense, mask)
    end
end

PrunableDense(dense::Dense) = PrunableDense(dense, unpruned_mask(dense.weight))
PrunableDense(sizes::Pair{<:Integer,<:Integer}, σ = identity; kwargs...) =
    PrunableDense(Dense(sizes, σ; kwargs...))
PrunableDense(W::AbstractMatrix, bias = true, σ = identity) = PrunableDense(Dense(W, bias, σ))

unpruned_mask(W) = fill!(similar(W, Bool), true)

Flux.@layer :noexpand PrunableDense trainable=(dense,)

function Base.show(io::IO, layer::PrunableDense)
    (; weight, bias, σ) = layer.dense
    print(io, "PrunableDense(", size(weight, 2), " => ", size(weight, 1))
    σ === identity || print(io, ", ", σ)
    print(io, "; ")
    bias === false && print(io, "bias=false, ")
    print(io, "density=", round(density(layer); sigdigits = 3), ")")
    return nothing
end

function (layer::PrunableDense)(x::AbstractVecOrMat)
    (; weight, bias, σ) = layer.dense
    Flux._size_check(layer, x, 1 => size(weight, 2))
    return NNlib.bias_act!(σ, masked_mul(weight, layer.mask, Flux._match_eltype(layer.dense, x)), bias)
end

function (layer::PrunableDense)(x::AbstractArray)
    Flux._size_check(layer, x, 1 => size(layer.dense.weight, 2))
    return reshape(layer(reshape(x, size(x, 1), :)), :, size(x)[2:end]...)
end

"`(W .* M) * x`, without the copy of `W`: pruned weights that are not 0 are set to 0 in place."
masked_mul(W, M, x) = shared_product(zero_pruned!(W, M), x)

function ChainRulesCore.rrule(::typeof(masked_mul), W, M, x)
    y = masked_mul(W, M, x)
    project_W, project_x = ProjectTo(W), ProjectTo(x)
    function masked_mul_pullback(ȳ)
        dy = unthunk(ȳ)
        dW, dx = @thunk(project_W(mask!(gradient_of_weight(W, dy, x), M))), @thunk(project_x(shared_product(W', dy)))
        return NoTangent(), dW, NoTangent(), dx
    end
    return y, masked_mul_pullback
end

gradient_of_weight(W, dy, x) = shared_product(dy, x')
gradient_of_weight(W::Matrix{T}, dy::Matrix{T}, x::Matrix{T}) where {T<:Union{Float32,Float64}} =
    shared_product!(memory_for_gradient(W), dy, x')

"""
    mask!(A::AbstractArray, mask)
    mask!(model)
    mask!(opt_state, model)

Set to 0, in place: the entries of `A` where `mask` is `false`; every pruned weight of a model; the memory
that an optimiser state from `Flux.setup` keeps of the pruned weights of `model` (momentum revives them
otherwise).
"""
mask!(A::AbstractArray, mask::AbstractArray{Bool}) = A .= ifelse.(mask, A, zero(eltype(A)))
function mask!(A::Array, mask::Array{Bool}) # the same, six times as fast: the broadcast is not vectorised
    places = eachindex(A, mask)
    keeps_all(mask) && return A
    @inbounds @simd for i in places
        A[i] = ifelse(mask[i], A[i], zero(eltype(A)))
    end
    return A
end
mask!(layer::Prunable) = (mask!(weight(layer), layer.mask); layer)
mask!(model) = (foreach(mask!, prunables(model)); model)

function mask!(opt, model)
    foreach(((leaf, mask),) -> mask_memory!(leaf.state, mask), memories(opt, model))
    return opt
end

"""
    memories(opt, model) -> Vector

The leaf that an optimiser state holds for each weight with a mask that is trained, and the mask. Throws `ArgumentError` if the
state is not of this model.
"""
memories(opt, model) = add_memories!(Tuple{Optimisers.Leaf,AbstractArray{Bool}}[], opt, model)

function add_memories!(found, opt, node, mask = nothing)
    if opt isa Optimisers.Leaf
        isnothing(mask) || push!(found, (opt, mask))
    elseif opt !== () # of what is not trainable
        nodes = children(node)
        opt isa Union{Tuple,NamedTuple,AbstractArray,AbstractDict} && issetequal(keys(opt), keys(nodes)) || throw(ArgumentError(
            "opt must be what Flux.setup(rule, model) returns for this model, but does not fit its $(nameof(typeof(node)))"))
        for (key, part) in pairs(nodes)
            add_memories!(found, opt[key], part, node isa Prunable ? node.mask : key === :weight ? mask : nothing)
        end
    end
    return found
end

mask_memory!(memory::Union{Tuple,NamedTuple}, mask) = foreach(m -> mask_memory!(m, mask), memory)
mask_memory!(memory::AbstractArray, mask) = size(memory) == size(mask) && mask!(memory, mask)
mask_memory!(memory, mask) = nothing

"Whether a mask prunes nothing, which is found out in a tenth of the time that it would take to apply it."
function keeps_all(mask::Array{Bool})
    for part in Iterators.partition(eachindex(mask), 2^12)
        pruned = 0x00
        @inbounds @simd for i in part
            pruned |= UInt8(!mask[i])
        end
        iszero(pruned) || return false
    end
    return true
end

# A check that only reads lets concurrent callers share a layer, and costs less than writing.
function zero_pruned!(W::Array, M::Array{Bool})
    places, stray = eachindex(W, M), 0x00
    keeps_all(M) && return W
    @inbounds @simd for i in places
        stray |= UInt8(!M[i]) & UInt8(W[i] != 0)
    end
    return iszero(stray) ? W : mask!(W, M)
end
function zero_pruned!(W, M)
    stray = mapreduce((w, m) -> !m & !iszero(w), |, W, M; init = false)
    return stray ? mask!(W, M) : W
end

"The Flux layer in a prunable one, or what a gradient or an optimiser state `tree` of the prunable one holds for it."
inner(layer::Prunable) = inner(layer, layer)
inner(tree, ::PrunableDense) = tree.dense

weight(layer) = inner(layer).weight
bias(layer) = inner(layer).bias

"The layer with another weight and mask, and perhaps another bias or activation, but all else the same."
rebuilt(layer::PrunableDense, W, mask; bias = bias(layer), σ = layer.dense.σ) = PrunableDense(Dense(W, bias, σ), mask)

"""
    canonical(layer, A)
    native(layer, A)

An array of the size of the layer's weight with the dimensions `(out, in, kernel...)`, ordered as PyTorch orders them (which
does not flip the kernels of convolutions); and back. Where nothing is to be done, that is the array itself.
"""
canonical(::PrunableDense, A) = on_host(A)
native(::PrunableDense, A) = A

on_host(A::Array) = A
on_host(A) = Array(A)

"""
    density(model)
    density(layer)

Kept prunable weights ÷ all prunable weights. Biases are not counted. `NaN` if there are none.
"""
density(layer::Prunable) = count(layer.mask) / length(layer.mask)
function density(model)
    masks = [layer.mask for layer in prunables(model)]
    return sum(count, masks; init = 0) / sum(length, masks; init = 0)
end

"""
    sparsity(model)
    sparsity(layer)

Pruned prunable weights ÷ all prunable weights: `1 - density`.
"""
sparsity(model) = 1 - density(model)
