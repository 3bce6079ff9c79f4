# A training step whose work is proportional to the weights that are kept: activations in panels, as for inference, and
# the gradient of kept weights only. What is chosen depends on densities alone, never on a measurement, so that a run
# that is repeated or resumed gives the same numbers.

"Density up to which a layer, and a network, is trained on its kept weights only; above, BLAS is faster."
const TRAINED_SPARSE = 0.5

"The products of a layer's weight that training takes, of kept weights only."
struct SparseProducts
    W::Matrix{Float32}
    forward::SparseKernel
    backward::SparseKernel # of the transposed weight
    at::Vector{Int32} # where in W the backward kernel's values are, in the order of memory as far as blocks allow
    order::Vector{Int32} # the forward kernel's k-th weight is the backward kernel's order[k]-th
end

function SparseProducts(W, mask, bias, relu)
    forward, places = packed(mask, bias, relu)
    backward, transposed_places = packed(permutedims(mask), zeros(Float32, size(W, 2)), false)
    outputs, inputs = size(W)
    at = map(place -> Int32((mod1(place, inputs) - 1) * outputs + fld1(place, inputs)), transposed_places)
    position = zeros(Int32, length(W))
    position[at] = eachindex(at)
    return SparseProducts(W, forward, backward, at, position[places])
end

"Take the weights as they are now."
function refresh!(products::SparseProducts)
    (; W, forward, backward, at, order) = products
    @inbounds for k in eachindex(at)
        backward.values[k] = W[at[k]]
    end
    @inbounds for k in eachindex(order)
        forward.values[k] = backward.values[order[k]]
    end
    return products
end

forward!(y, x, products::SparseProducts, width) = multiply!(y, x, products.forward, Val(width ÷ LANES))
backward!(dx, dy, products::SparseProducts, width) = multiply!(dx, dy, products.backward, Val(width ÷ LANES))
slopes(products::SparseProducts) = zeros(Float32, length(products.order))
add_slopes!(slopes, dy, x, products::SparseProducts, width) =
    add_slopes!(slopes, dy, x, products.forward, Val(width ÷ LANES))

"Write the gradient of kept weights to where they are; what is pruned stays as it is, 0."
function scatter!(dW, slopes, products::SparseProducts)
    (; at, order, backward) = products
    ordered = backward.values # which the next step fills anew
    @inbounds for k in eachindex(order)
        ordered[order[k]] = slopes[k]
    end
    @inbounds for k in eachindex(at)
        dW[at[k]] = ordered[k]
    end
    return dW
end

"The same products with all weights, on BLAS."
struct DenseProducts
    W::Matrix{Float32}
    mask::Matrix{Bool}
    bias::Vector{Float32}
    relu::Bool
end

refresh!(products::DenseProducts) = (zero_pruned!(products.W, products.mask); products)
slopes(products::DenseProducts) = zero(products.W)
backward!(dx, dy, products::DenseProducts, width) = mul!(dx, dy, products.W)
add_slopes!(slopes, dy, x, products::DenseProducts, width) = mul!(slopes, dy', x, true, true)
scatter!(dW, slopes, products::DenseProducts) = (copyto!(dW, slopes); mask!(dW, products.mask))

function forward!(y, x, products::DenseProducts, width)
    (; W, bias, relu) = products
    mul!(y, x, W')
    return y .= relu ? max.(y .+ bias', 0) : y .+ bias'
end

"A layer in training: its products, the activation where kernels do not apply it, and the gradients."
struct TrainedLayer
    products::Union{SparseProducts,DenseProducts}
    after::Any
    σ::Any
    dW::Matrix{Float32}
    has_bias::Bool
end

function TrainedLayer(layer::PrunableDense)
    (; weight, bias, σ) = layer.dense
    relu, b = σ === NNlib.relu, bias === false ? zeros(Float32, size(weight, 1)) : bias
    products = density(layer) <= TRAINED_SPARSE ? SparseProducts(weight, layer.mask, b, relu) :
               DenseProducts(weight, layer.mask, b, relu)
    after = relu || σ === identity ? nothing : NNlib.fast_act(σ, weight)
    return TrainedLayer(products, after, σ, zero(weight), bias !== false)
end

"Multiply the gradient of a layer's outputs `y` by the slope of its activation there."
through!(dy, y, ::typeof(identity)) = dy
through!(dy, y, ::typeof(NNlib.relu)) = dy .= ifelse.(y .> 0, dy, 0)
through!(dy, y, ::typeof(tanh)) = dy .*= 1 .- y .^ 2
through!(dy, y, ::typeof(NNlib.sigmoid)) = dy .*= y .* (1 .- y)

const SMOOTH = Union{typeof(identity),typeof(NNlib.relu),typeof(tanh),typeof(NNlib.sigmoid)}
const TrainedSparse = PrunableDense{<:Dense{<:SMOOTH,Matrix{Float32},<:Union{Bool,Vector{Float32}}},Matrix{Bool}}

"Of one panel: the activations before and after each layer, and the gradients of those after it."
struct Workspace
    activations::Vector{Matrix{Float32}}
    deltas::Vector{Matrix{Float32}}
end

function workspace(layers, width)
    sizes = [size(first(layers).dW, 2); map(layer -> size(layer.dW, 1), layers)]
    return Workspace([zeros(Float32, width, n) for n in sizes], [zeros(Float32, width, n) for n in sizes[2:end]])
end

"A perceptron in training, for [`step!`](@ref), and what that needs again and again. It is of the masks as they are now."
struct SparseTrainer{M}
    model::M
    layers::Vector{TrainedLayer}
    workspaces::Dict{Int,Vector{Workspace}} # by width
end

"""
    trainer(model)

What [`step!`](@ref) trains fastest as long as masks stay as they are: the model, or, of a `Chain` of `PrunableDense` with few
weights left, a `SparseTrainer`.
"""
function trainer(model)
    model isa Chain && all(layer -> layer isa TrainedSparse, model.layers) && allunique(model.layers) &&
        density(model) <= TRAINED_SPARSE || return model
    return SparseTrainer(model, map(TrainedLayer, collect(PrunableDense, model.layers)), Dict{Int,Vector{Workspace}}())
end

function step!(loss, trainer::SparseTrainer, opt, x, y)
    (; model, layers) = trainer
    n = size(x, 2)
    x isa Matrix{Float32} && n > 1 || return step!(loss, model, opt, x, y)
    Flux._size_check(first(model), x, 1 => size(first(layers).dW, 2))
    foreach(layer -> refresh!(layer.products), layers)
    threads = all(layer -> layer.products isa SparseProducts, layers) ? Threads.nthreads() : 1 # BLAS has its own
    width = LANES * clamp(cld(n, LANES * threads), 1, MAX_VECTORS)
    panels = collect(Iterators.partition(1:n, width))
    spaces = get!(Vector{Workspace}, trainer.workspaces, width)
    while length(spaces) < length(panels)
        push!(spaces, workspace(layers, width))
    end
    groups = collect(Iterators.partition(eachindex(panels), cld(length(panels), threads)))

    ŷ = Matrix{Float32}(undef, size(last(layers).dW, 1), n)
    in_tasks(groups) do group
        foreach(p -> forward_panel!(ŷ, spaces[p], layers, x, panels[p], width), group)
    end
    value, (dŷ,) = Flux.withgradient(ŷ -> loss(ŷ, y), ŷ)
    isfinite(value) || throw(DomainError(value, "the training loss is not finite; try a lower learning rate"))
    of_groups = in_tasks(groups) do group
        sums = map(layer -> (weight = slopes(layer.products), bias = zeros(Float32, size(layer.dW, 1))), layers)
        foreach(p -> backward_panel!(sums, spaces[p], layers, dŷ, panels[p], width), group)
        sums
    end
    gradient = (layers = [gradient_of(layer, map(sums -> sums[i], of_groups)) for (i, layer) in enumerate(layers)],)
    masked_update!(opt, model, gradient)
    return value
end

in_tasks(f, groups) = length(groups) == 1 ? [f(only(groups))] : map(fetch, map(group -> Threads.@spawn(f(group)), groups))

function gradient_of(layer, slopes)
    for other in slopes[2:end]
        slopes[1].weight .+= other.weight
        slopes[1].bias .+= other.bias
    end
    scatter!(layer.dW, slopes[1].weight, layer.products)
    return (dense = (weight = layer.dW, bias = layer.has_bias ? slopes[1].bias : nothing, σ = nothing), mask = nothing)
end

function forward_panel!(ŷ, space, layers, x, samples, width)
    (; activations) = space
    n, m = length(samples), size(ŷ, 1)
    n < width && fill!(activations[1], 0)
    GC.@preserve x activations transpose_into!(pointer(activations[1]), width, pointer(x, (first(samples) - 1) * size(x, 1) + 1),
                                               size(x, 1), size(x, 1), n)
    for (i, layer) in enumerate(layers)
        y = forward!(activations[i + 1], activations[i], layer.products, width)
        isnothing(layer.after) || activate!(layer.after, y, length(y))
    end
    GC.@preserve ŷ activations transpose_into!(pointer(ŷ, (first(samples) - 1) * m + 1), m, pointer(activations[end]), width, n, m)
    return nothing
end

function backward_panel!(slopes, space, layers, dŷ, samples, width)
    (; activations, deltas) = space
    fill!(deltas[end], 0)[1:length(samples), :] = transpose(view(dŷ, :, samples))
    for i in reverse(eachindex(layers))
        layer, delta = layers[i], deltas[i]
        through!(delta, activations[i + 1], layer.σ)
        add_slopes!(slopes[i].weight, delta, activations[i], layer.products, width)
        slopes[i].bias .+= vec(sum(delta; dims = 1))
        i > 1 && backward!(deltas[i - 1], delta, layer.products, width)
    end
    return nothing
end
