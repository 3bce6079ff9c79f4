"""
    Training(; epochs = 15, batchsize = 60, optimiser = Adam(1.2f-3), decay = 1, loss = logitcrossentropy)

How a network is trained in each round. `optimiser` is any rule of Optimisers.jl, `loss(ŷ, y)` any function. The
learning rate, the rule's `eta`, is multiplied by `decay` after every epoch of a round.

Throws `ArgumentError` for less than 0 epochs, batches of less than a sample, and a `decay` that is not positive or that is of a
rule without one `eta`.
"""
Base.@kwdef struct Training{O,L}
    epochs::Int = 15
    batchsize::Int = 60
    optimiser::O = Adam(1.2f-3)
    decay::Real = 1
    loss::L = logitcrossentropy
    function Training(epochs, batchsize, optimiser::O, decay, loss::L) where {O,L}
        epochs >= 0 || throw(ArgumentError("Training's epochs must be at least 0, not $epochs"))
        batchsize >= 1 || throw(ArgumentError("Training's batchsize must be at least 1, not $batchsize"))
        decay == 1 || 0 < decay < Inf && length(learning_rates(optimiser)) == 1 || throw(ArgumentError(
            "Training's decay must be 1, or positive with an optimiser that has one learning rate, not $decay with $optimiser"))
        return new{O,L}(epochs, batchsize, optimiser, decay, loss)
    end
end

learning_rates(rule) = hasproperty(rule, :eta) ? [rule.eta] : []
learning_rates(chain::OptimiserChain) = reduce(vcat, map(learning_rates, chain.opts))

"Set the learning rate to that of an epoch, counted from 1."
function adjust_rate!(opt, training, epoch)
    training.decay == 1 || Optimisers.adjust!(opt, only(learning_rates(training.optimiser)) * training.decay^(epoch - 1))
    return opt
end

"""
    train_masked!(loss, model, batches, opt_state) -> Vector of losses

One step of training for each `(x, y)` in `batches`, as `Flux.train!` does it with `loss(model(x), y)`, except
that pruned weights are exactly 0 after every step, whatever the optimiser does. `opt_state` comes from
`Flux.setup`. Returns the loss before each step. A perceptron in `Float32` of which at most 70 % of the weights are left
is trained on these alone (but for layers of which more are), which is the same to rounding and takes less time: `model`
and `opt_state` are then as the last step has left them when this returns or throws, not between two steps, and masks must
stay as they are meanwhile.

Throws `DomainError`, with the model as it was before that step, if a loss is not finite, and `ArgumentError` if `batches` are a
pair of arrays, or `opt_state` is not of this model.

# Examples
```jldoctest
julia> model = prunable(Chain(Dense(2 => 4, relu), Dense(4 => 2)));

julia> prune!(model, Magnitude(); sparsity = 0.5);

julia> x = rand(Float32, 2, 32); y = Flux.onehotbatch(x[1, :] .> x[2, :], (true, false));

julia> losses = train_masked!(Flux.logitcrossentropy, model, [(x, y) for _ in 1:200], Flux.setup(Adam(0.01), model));

julia> losses[end] < losses[1] && sparsity(model) == 0.5
true
```
"""
function train_masked!(loss, model, batches, opt)
    batches isa Union{AbstractArray{<:Number},Tuple{AbstractArray,AbstractArray}} && throw(ArgumentError(
        "batches must be an iterator of pairs (x, y), such as a DataLoader or [(x, y)], not $(summary(batches))"))
    memories(opt, model)
    trained = trainer(model, opt)
    hold_blas()
    return try
        [step!(loss, trained, opt, x, y) for (x, y) in batches]
    finally
        release_blas()
        store!(trained)
    end
end

"""
Memory for gradients of weights, by weight, in which each step of training puts its own: without, it would take new memory, as
much as the weights do, and leave that to the garbage collector.
"""
struct GradientMemory
    free::IdDict{Matrix,Matrix}
    lent::IdDict{Matrix,Matrix}
end
GradientMemory() = GradientMemory(IdDict(), IdDict())

"Call `f`, whose gradients of weights are in the memory and valid until this is called again."
function with_memory(f, memory::GradientMemory)
    merge!(memory.free, memory.lent)
    return task_local_storage(f, :gradients_of_weights, memory)
end
with_memory(f, ::Nothing) = f()

function memory_for_gradient(W)
    memory = get(task_local_storage(), :gradients_of_weights, nothing)
    isnothing(memory) && return similar(W)
    slopes = pop!(memory.free, W, nothing)
    return (memory.lent[W] = isnothing(slopes) ? similar(W) : slopes)::typeof(W)
end

"What [`step!`](@ref) trains with whole weights: the model, whose running statistics a step that fails must leave alone."
struct DenseTrainer{M}
    model::M
    statistics::Vector{AbstractVector}
    gradients::Union{GradientMemory,Nothing} # none where an optimiser might keep a gradient
end

function DenseTrainer(model, opt)
    norms = Iterators.filter(part -> part isa Union{BatchNorm,Flux.InstanceNorm}, Flux.modules(model))
    statistics = AbstractVector[v for norm in norms for v in (norm.μ, norm.σ²) if v isa AbstractVector]
    keeps_none = all(((leaf, _),) -> is_elementwise(leaf.rule), memories(opt, model))
    return DenseTrainer(model, statistics, keeps_none ? GradientMemory() : nothing)
end

function step!(loss, (; model, statistics, gradients)::DenseTrainer, opt, x, y)
    before = map(copy, statistics)
    try
        return with_memory(() -> step!(loss, model, opt, x, y), gradients)
    catch
        foreach(copyto!, statistics, before)
        rethrow()
    end
end

function step!(loss, model, opt, x, y)
    value, (gradient,) = Flux.withgradient(m -> loss(forward(m, x), y), model)
    isfinite(value) || throw(DomainError(value, "the training loss is not finite; try a lower learning rate"))
    masked_update!(opt, model, gradient)
    return value
end

"What `Optimisers.update!` does to `model` and `opt`, leaf by leaf in the same order, after which pruned weights are 0."
function masked_update!(opt, model, gradient)
    sums, leaves = IdDict{Optimisers.Leaf,Any}(), Any[] # tied parameters share a leaf: their gradients are added up
    collect_leaves!(sums, leaves, opt, model, gradient)
    for (leaf, x, mask) in leaves # in an order that all processes share, as rules may exchange gradients
        leaf.frozen || update_leaf!(leaf.rule, leaf, x, sums[leaf], mask)
    end
    return model
end

function collect_leaves!(sums, leaves, opt, node, gradient, mask = nothing)
    gradient isa Ref && (gradient = gradient[]) # of a mutable struct
    if isnothing(gradient) || opt === ()
        return leaves
    elseif opt isa Optimisers.Leaf
        haskey(sums, opt) || push!(leaves, (opt, node, mask))
        sums[opt] = haskey(sums, opt) ? sums[opt] .+ gradient : gradient
    elseif node isa Prunable
        memory, slopes = inner(opt, node), inner(gradient, node)
        isnothing(slopes) && return leaves
        collect_leaves!(sums, leaves, memory.weight, weight(node), slopes.weight, node.mask)
        collect_leaves!(sums, leaves, memory.bias, bias(node), slopes.bias)
    else
        nodes = children(node)
        foreach(key -> collect_leaves!(sums, leaves, opt[key], nodes[key], gradient[key]), keys(nodes))
    end
    return leaves
end

function update_leaf!(rule, leaf, x, dx, mask)
    Optimisers.update!(leaf, x, dx)
    return isnothing(mask) ? x : mask!(x, mask)
end

# Adam as Optimisers has it, in one pass over memory where that takes three, none of them vectorised.
function update_leaf!(rule::Adam, leaf, x::Array{T}, dx::Array{T}, mask) where {T<:Union{Float32,Float64}}
    m, v, powers = leaf.state
    places = eachindex(x, dx, m, v)
    if length(places) < SHARED_UPDATE
        adam!(rule, m, v, powers, x, dx, mask, places)
    else
        share_items((_, part) -> adam!(rule, m, v, powers, x, dx, mask, part), collect(parts(length(places))))
    end
    leaf.state = (m, v, powers .* T.(rule.beta))
    return x
end

function adam!(rule, m, v, powers, x::Array{T}, dx, mask, places) where {T}
    β1, β2 = T.(rule.beta)
    η, ϵ, (c1, c2) = T(rule.eta), T(rule.epsilon), 1 .- powers
    @inbounds @simd ivdep for i in places
        m[i] = β1 * m[i] + (1 - β1) * dx[i]
        v[i] = β2 * v[i] + (1 - β2) * abs2(dx[i])
        moved = x[i] - m[i] / c1 / (@fastmath(sqrt(v[i] / c2)) + ϵ) * η
        x[i] = isnothing(mask) ? moved : ifelse(mask[i], moved, zero(T))
    end
end

"""
    evaluate(model, batches; loss = logitcrossentropy) -> (; loss, accuracy)

Mean loss and share of labels that are the largest output, over all `(x, y)` in `batches`, or over one pair `(x, y)` of arrays. The
one-hot `y` has the size of the outputs, `(classes, n)` or, of sequences, `(classes, time, n)`. Throws `ArgumentError` if there are
no samples.
"""
function evaluate(model, batches; loss = logitcrossentropy)
    n, total, labels, correct = 0, 0.0, 0, 0
    given = as_batches(batches, 1024)
    hold_blas()
    try
        for (x, y) in given
            ŷ = model(x)
            m = size(ŷ)[end]
            n += m
            total += m * loss(ŷ, y)
            right = onecold(Flux.cpu(ŷ)) .== onecold(Flux.cpu(y))
            labels += length(right)
            correct += count(right)
        end
    finally
        release_blas()
    end
    n > 0 || throw(ArgumentError("there must be at least one sample"))
    return (; loss = total / n, accuracy = correct / labels)
end

function as_batches(data::Tuple{AbstractArray,AbstractArray}, batchsize; kwargs...)
    numobs(data) > 0 || throw(ArgumentError("there must be at least one sample"))
    return DataLoader(data; batchsize = min(batchsize, numobs(data)), kwargs...)
end
as_batches(batches, batchsize; kwargs...) = Base.IteratorSize(batches) isa Union{Base.HasLength,Base.HasShape} ? batches :
    throw(ArgumentError("data must be a pair (x, y) of arrays or an iterator of such batches that has a length"))
