# A training step whose work is proportional to the weights that are kept: activations in panels, as for inference, and
# the gradient of kept weights only. What is chosen depends on densities alone, never on a measurement, so that a run
# that is repeated or resumed gives the same numbers.

"Density up to which a network, and each of its layers, is trained on its kept weights only; above, BLAS is faster."
const TRAINED_SPARSE = 0.7
is_sparse(part) = density(part) <= TRAINED_SPARSE

"""
The products of a layer's weight that training takes, of kept weights only, which are in `forward` while training goes on:
the k-th of them is at `places[k]` of the weight's memory, and the k-th of `backward`, of the transposed weight, is the
`order[k]`-th of `forward`. A first layer needs no gradient of its inputs.
"""
struct SparseProducts
    forward::SparseKernel{LOW,UInt8}
    places::Vector{Int32}
    backward::Union{SparseKernel{LOW,UInt8},Nothing}
    order::Vector{Int32}
end

function SparseProducts(mask, bias, relu; is_first)
    outputs, inputs = size(mask)
    forward, places = packed(SparseKernel{LOW}, permutedims(mask), (outputs, 1), bias, relu)
    is_first && return SparseProducts(forward, places, nothing, Int32[])
    backward, backward_places = packed(SparseKernel{LOW}, mask, (1, outputs), zeros(Float32, inputs), false)
    position = Vector{Int32}(undef, length(mask))
    position[places] = eachindex(places)
    return SparseProducts(forward, places, backward, position[backward_places])
end

forward!(y, x, products::SparseProducts, width) = multiply!(y, x, products.forward, Val(width ÷ LANES))
backward!(dx, dy, products::SparseProducts, width) = multiply!(dx, dy, products.backward, Val(width ÷ LANES))
slopes(products::SparseProducts) = zeros(Float32, length(products.places))
add_slopes!(slopes, dy, x, products::SparseProducts, width) =
    add_slopes!(slopes, dy, x, products.forward, Val(width ÷ LANES))

"The products of a layer's weight, of all of it, in the same panels."
struct DenseProducts
    W::Matrix{Float32}
    bias::Vector{Float32}
    relu::Bool
end

function forward!(y, x, (; W, bias, relu)::DenseProducts, width)
    mul!(y, x, W')
    y .= relu ? max.(y .+ bias', 0) : y .+ bias'
    return y
end
backward!(dx, dy, products::DenseProducts, width) = mul!(dx, dy, products.W)
slopes(products::DenseProducts) = zeros(Float32, size(products.W))
add_slopes!(slopes, dy, x, ::DenseProducts, width) = mul!(slopes, dy', x, true, true)
refresh!(::DenseProducts) = nothing

"Take up the weights as the last update has left them."
function refresh!((; forward, backward, order)::SparseProducts)
    isnothing(backward) || @inbounds for k in eachindex(order)
        backward.values[k] = forward.values[order[k]]
    end
    return nothing
end

"""
A layer in training: its products, the activation where kernels do not apply it, and the optimiser's memory, both as the
optimiser has it and as the products need it.
"""
mutable struct TrainedLayer
    const products::Union{SparseProducts,DenseProducts}
    const after::Any
    const σ::Any
    const W::Matrix{Float32}
    const mask::Matrix{Bool}
    const bias::Union{Vector{Float32},Bool}
    const memory::NamedTuple # as in the optimiser's tree
    of_weight::Optimisers.Leaf
end

function TrainedLayer(layer::PrunableDense, memory, is_first)
    (; weight, bias, σ) = layer.dense
    relu, b = σ === NNlib.relu, bias === false ? zeros(Float32, size(weight, 1)) : bias
    products = is_sparse(layer) ? SparseProducts(layer.mask, b, relu; is_first) : DenseProducts(weight, b, relu)
    after = relu || σ === identity ? nothing : NNlib.fast_act(σ, weight)
    return TrainedLayer(products, after, σ, weight, layer.mask, bias, memory, memory.weight)
end

inputs(layer::TrainedLayer) = size(layer.W, 2)
outputs(layer::TrainedLayer) = size(layer.W, 1)

load!(layer::TrainedLayer) = load!(layer, layer.products)
function load!(layer, ::DenseProducts)
    zero_pruned!(layer.W, layer.mask)
    layer.of_weight = layer.memory.weight
    return layer
end
function load!(layer, (; forward, places)::SparseProducts)
    forward.values .= @view layer.W[places]
    (; rule, state, frozen) = layer.memory.weight
    layer.of_weight = Optimisers.Leaf(rule, gathered(state, places, layer.W), frozen)
    return layer
end

store!(layer::TrainedLayer) = store!(layer, layer.products)
store!(layer, ::DenseProducts) = layer
function store!(layer, (; forward, places)::SparseProducts)
    zero_pruned!(layer.W, layer.mask)[places] = forward.values
    leaf = layer.memory.weight
    leaf.state = scattered!(leaf.state, layer.of_weight.state, places)
    return layer
end

"The optimiser's memory of kept weights: arrays of the weight's size are of its elements."
gathered(state::AbstractArray, places, W) = size(state) == size(W) ? state[places] : state
gathered(state::Union{Tuple,NamedTuple}, places, W) = map(part -> gathered(part, places, W), state)
gathered(state, places, W) = state

"The same memory, of all weights, with that of kept weights as it is now."
scattered!(state::AbstractArray, now, places) = size(state) == size(now) ? now : setindex!(state, now, places)
scattered!(state::Union{Tuple,NamedTuple}, now, places) = map((was, is) -> scattered!(was, is, places), state, now)
scattered!(state, now, places) = now

function update!(layer::TrainedLayer, slopes)
    (; weight, bias) = layer.memory
    layer.of_weight.rule, layer.of_weight.frozen = weight.rule, weight.frozen # which may have been adjusted
    weight.frozen || update_weights!(weight.rule, layer, slopes.weight, layer.products)
    layer.bias === false || bias.frozen || update_leaf!(bias.rule, bias, layer.bias, slopes.bias, nothing)
    return layer
end

update_weights!(rule, layer, slopes, (; forward)::SparseProducts) =
    update_leaf!(rule, layer.of_weight, forward.values, slopes, nothing)
update_weights!(rule, layer, slopes, ::DenseProducts) =
    update_leaf!(rule, layer.of_weight, layer.W, mask!(slopes, layer.mask), layer.mask)

"Multiply the gradient of a layer's outputs `y` by the slope of its activation there."
through!(dy, y, ::typeof(identity)) = dy
through!(dy, y, ::typeof(NNlib.relu)) = dy .= ifelse.(y .> 0, dy, zero(eltype(dy)))
through!(dy, y, ::typeof(tanh)) = dy .*= 1 .- y .^ 2
through!(dy, y, ::typeof(NNlib.sigmoid)) = dy .*= y .* (1 .- y)

const SMOOTH = Union{typeof(identity),typeof(NNlib.relu),typeof(tanh),typeof(NNlib.sigmoid)}
const TrainedSparse = PrunableDense{<:Dense{<:SMOOTH,Matrix{Float32},<:Union{Bool,Vector{Float32}}},Matrix{Bool}}

# Of these the change of a weight depends on its own gradient alone, or on a norm that pruned weights add nothing to.
const ElementwiseRule = Union{Descent,Momentum,Nesterov,RMSProp,Adam,RAdam,AdaMax,OAdam,AdaGrad,AdaDelta,AMSGrad,NAdam,AdamW,
                              AdaBelief,Lion,WeightDecay,SignDecay,ClipGrad,ClipNorm,AccumGrad}
is_elementwise(rule) = rule isa ElementwiseRule
is_elementwise(rule::OptimiserChain) = all(is_elementwise, rule.opts)

"Of one panel: the activations before and after each layer, and the gradients of those after it."
struct Workspace
    activations::Vector{Matrix{Float32}}
    deltas::Vector{Matrix{Float32}}
end

function workspace(layers, width)
    sizes = [inputs(first(layers)); map(outputs, layers)]
    return Workspace([zeros(Float32, width, n) for n in sizes], [zeros(Float32, width, n) for n in sizes[2:end]])
end

const Slopes = @NamedTuple{weight::VecOrMat{Float32}, bias::Vector{Float32}}

"""
A perceptron in training, for [`step!`](@ref), and what that needs again and again. It is of the masks as they are now. Between
the first step and `store!`, it has the kept weights and their memory, and the model what they were before.
"""
mutable struct SparseTrainer{M,O}
    const model::M
    const opt::O
    const layers::Vector{TrainedLayer}
    const workspaces::Dict{Int,Vector{Workspace}} # by width
    const slopes::Vector{Vector{Slopes}} # by group of panels and layer
    loaded::Bool
end

"""
    trainer(model, opt)

What [`step!`](@ref) trains fastest as long as masks stay as they are: a `DenseTrainer`, or, of a `Chain` of `PrunableDense` with
few weights left, a `SparseTrainer`. After the last step, even if it throws, call [`store!`](@ref).
"""
function trainer(model, opt)
    model isa Chain && all(layer -> layer isa TrainedSparse, model.layers) && is_sparse(model) ||
        return DenseTrainer(model, opt)
    layers = collect(PrunableDense, values(model.layers))
    memories = map(inner, values(opt.layers), layers)
    leaves = [leaf for (; weight, bias) in memories for leaf in (weight, bias) if leaf isa Optimisers.Leaf]
    allunique(objectid, leaves) && all(leaf -> is_elementwise(leaf.rule), leaves) || return DenseTrainer(model, opt)
    trained = map((layer, memory) -> TrainedLayer(layer, memory, layer === first(layers)), layers, memories)
    return SparseTrainer(model, opt, trained, Dict{Int,Vector{Workspace}}(), Vector{Slopes}[], false)
end

"The `last` trainer if it trains just this, so that making it again is spared, or one that does."
trainer(model, opt, last) = trains(last, model, opt) ? last : trainer(model, opt)

trains(last, model, opt) = false
trains(last::SparseTrainer, model, opt) = last.model === model && last.opt === opt && all(is_current, last.layers)
is_current((; mask, products)::TrainedLayer) = is_current(mask, products)
is_current(mask, (; places)::SparseProducts) = count(mask) == length(places) && all(place -> mask[place], places)
is_current(mask, ::DenseProducts) = count(mask) / length(mask) > TRAINED_SPARSE

"Put what a trainer has into its model and optimiser state; return the model."
store!(trainer::DenseTrainer) = trainer.model
function store!(trainer::SparseTrainer)
    trainer.loaded && foreach(store!, trainer.layers)
    trainer.loaded = false
    return trainer.model
end

function load!(trainer::SparseTrainer)
    trainer.loaded || foreach(load!, trainer.layers)
    trainer.loaded = true
    return trainer
end

function step!(loss, trainer::SparseTrainer, opt, x, y)
    (; model, layers) = trainer
    x isa Matrix{Float32} && !isempty(x) || return step!(loss, store!(trainer), opt, x, y)
    Flux._size_check(first(model), x, 1 => inputs(first(layers)))
    load!(trainer)
    share_items((_, layer) -> refresh!(layer.products), layers)
    n = size(x, 2)
    threads = Threads.nthreads()
    width = LANES * clamp(cld(n, LANES * threads), 1, MAX_VECTORS)
    panels = collect(Iterators.partition(1:n, width))
    spaces = get!(Vector{Workspace}, trainer.workspaces, width)
    while length(spaces) < length(panels)
        push!(spaces, workspace(layers, width))
    end
    groups = collect(Iterators.partition(eachindex(panels), cld(length(panels), threads)))
    while length(trainer.slopes) < length(groups)
        push!(trainer.slopes, [(weight = slopes(layer.products), bias = zeros(Float32, outputs(layer))) for layer in layers])
    end

    ŷ = Matrix{Float32}(undef, outputs(last(layers)), n)
    share_items(groups) do _, group
        foreach(p -> forward_panel!(ŷ, spaces[p], layers, x, panels[p], width), group)
    end
    value, (dŷ,) = Flux.withgradient(ŷ -> loss(ŷ, y), ŷ)
    isfinite(value) || throw(DomainError(value, "the training loss is not finite; try a lower learning rate"))
    isnothing(dŷ) && return value # it does not depend on the outputs
    share_items(groups) do g, group
        foreach(fill_zero!, trainer.slopes[g])
        foreach(p -> backward_panel!(trainer.slopes[g], spaces[p], layers, dŷ, panels[p], width), group)
    end
    share_items(layers) do i, layer
        total = trainer.slopes[1][i]
        for g in 2:length(groups)
            foreach((sum, part) -> sum .+= part, total, trainer.slopes[g][i])
        end
        update!(layer, total)
    end
    return value
end

fill_zero!(slopes) = foreach(part -> fill!(part, 0), slopes)

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
