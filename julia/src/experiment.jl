"""
    prune!(model, criterion, batch...; sparsity, structure = Global(), opt = nothing)

Prune `model` to `sparsity`: exactly `round(sparsity * n)` of each `n` competing weights, lowest
[`saliency`](@ref) first, are masked and set to 0 (see [`PrunableFlux.select`](@ref) for the rule and the
errors). Pass the optimiser state as `opt` to prune in the middle of training: its memory of the pruned
weights is cleared. If anything is wrong, nothing has changed.

# Examples
```jldoctest
julia> model = prunable(Chain(Dense(784 => 300, relu), Dense(300 => 10)));

julia> prune!(model, Magnitude(); sparsity = 0.9);

julia> sparsity(model)
0.9

julia> prune!(model, RandomSaliency(); sparsity = [0.95, 0.92], structure = Layerwise());

julia> density.(prunables(model)) ≈ [0.05, 0.08]
true
```
"""
function prune!(model, criterion, batch...; sparsity, structure = Global(), opt = nothing)
    layers = prunables(model)
    scores = map(Array, saliency(criterion, model, batch...))
    masks = select(structure, scores, [Array(layer.mask) for layer in layers], sparsity)
    foreach((layer, mask) -> copyto!(layer.mask, mask), layers, masks)
    mask!(model)
    isnothing(opt) || mask!(opt, model)
    return model
end

"""
    iterative_prune!(model, train, test; saliency = Magnitude(), structure = Global(),
                     schedule = Exponential(rate = 0.2, rounds = 12), finetune = Rewind(),
                     training = Training(), rng = Random.default_rng()) -> history

Train `model`, then in each round of the schedule prune it, restart the survivors as `finetune` says, and train
again; with `finetune = nothing`, prune without training again. `train` and `test` are `(x, y)` pairs, `x` of
size `(features..., n)` and `y` one-hot `(classes, n)`, or iterators of such batches, as `Flux.DataLoader`; a
pair is shuffled anew in each epoch with `rng`. Every round begins with an empty optimiser memory. Criteria
that need data get the first batch of `train`.

Returns a vector of named tuples, which is a Tables.jl table, one row for the dense network (round 0) and one
per round: `round`, `sparsity`, `nonzero` (kept weights), `loss` and `accuracy` on `test`, `layers` (the density
of each), `seconds`.

Throws `ArgumentError`, before anything is trained, for a schedule that [`sparsities`](@ref) rejects or that begins
below what is pruned already, and for a `Rewind` to a step that training does not reach.

# Examples
```jldoctest
julia> x = rand(Float32, 2, 256); y = Flux.onehotbatch(x[1, :] .> x[2, :], (true, false));

julia> model = prunable(Chain(Dense(2 => 16, relu), Dense(16 => 2)));

julia> history = iterative_prune!(model, (x, y), (x, y); schedule = [0.5, 0.75], training = Training(epochs = 2));

julia> [row.sparsity for row in history]
3-element Vector{Float64}:
 0.0
 0.5
 0.75
```
"""
function iterative_prune!(model, train, test; saliency = Magnitude(), structure = Global(),
                          schedule = Exponential(rate = 0.2, rounds = 12), finetune = Rewind(),
                          training = Training(), rng::AbstractRNG = Random.default_rng())
    targets = sparsities(schedule)
    batches = as_batches(train, training.batchsize; shuffle = true, rng)
    copy_at = origin_step(finetune)
    0 <= copy_at && (copy_at == 0 || copy_at <= training.epochs * length(batches)) || throw(ArgumentError(
        "finetune must rewind to one of the $(training.epochs * length(batches)) training steps, not $copy_at"))
    to_drop(structure, [layer.mask for layer in prunables(model)], first(targets))
    started = time()
    origin = fit!(model, batches, training; copy_at)
    history = [report(model, test, training, 0, started)]
    for (round, target) in enumerate(targets)
        started = time()
        prune!(model, saliency, first(batches); sparsity = target, structure)
        restart!(finetune, model, origin, rng)
        isnothing(finetune) || fit!(model, batches, training)
        push!(history, report(model, test, training, round, started))
    end
    return history
end

"Train for `training.epochs`; return a copy of the model as it was after `copy_at` steps."
function fit!(model, batches, training; copy_at = nothing)
    opt = Flux.setup(training.optimiser, model)
    stream = Iterators.Stateful(Iterators.flatten(Iterators.repeated(batches, training.epochs)))
    if isnothing(copy_at)
        train_masked!(training.loss, model, stream, opt)
        return nothing
    end
    train_masked!(training.loss, model, Iterators.take(stream, copy_at), opt)
    origin = deepcopy(model)
    train_masked!(training.loss, model, stream, opt)
    return origin
end

function report(model, test, training, round, started)
    (; loss, accuracy) = evaluate(model, test; training.loss)
    layers = prunables(model)
    return (; round, sparsity = sparsity(model), nonzero = sum(layer -> count(layer.mask), layers),
            loss, accuracy, layers = map(density, layers), seconds = time() - started)
end
