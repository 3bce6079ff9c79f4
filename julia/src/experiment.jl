"""
    prune!(model, criterion, [data]; sparsity, structure = Global(), opt = nothing)

Prune `model` to `sparsity`: exactly `round(sparsity * n)` of each `n` competing weights, lowest
[`saliency`](@ref) first, are masked and set to 0 (see [`PrunableFlux.select`](@ref) for the rule and the
errors). `data` is the pair `(x, y)` that a criterion may need. The sparsity may be left out with [`Threshold`](@ref)
and [`NofM`](@ref). Pass the optimiser state as `opt` to prune in the middle of training: its memory of the pruned
weights is cleared. If anything is wrong, nothing has changed. Warns if a layer has lost all its weights.

Throws `ArgumentError` also if `data` is no pair, `opt` not the state of this model, or two layers share a weight.

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
function prune!(model, criterion, data...; kwargs...)
    alive() = [any(layer.mask) for layer in prunables(model)]
    before = alive()
    prune_silently!(model, criterion, data...; kwargs...)
    for i in findall(before .& .!alive())
        @warn "pruning left no weight in the $(ordinal(i)) layer, so that the outputs no longer depend on the \
            inputs; min_kept = 1 in the structure keeps one"
    end
    return model
end

"The masks on the host, as [`canonical`](@ref) arrays. Throws `ArgumentError` if layers share a weight, which then has two."
function host_masks(model)
    layers = prunables(model)
    for (j, layer) in enumerate(layers), i in 1:(j - 1)
        Base.mightalias(weight(layers[i]), weight(layer)) && throw(ArgumentError(
            "model must not have a weight in two layers, as in the $(ordinal(i)) and the $(ordinal(j)); use one layer twice"))
    end
    return [Array{Bool}(canonical(layer, layer.mask)) for layer in layers]
end

"Throw `ArgumentError` unless `model` can be pruned to `sparsity` so, as far as that can be told before data are seen."
function check_pruning(model, masks, criterion, structure, sparsity)
    of_neurons(criterion) && !(structure isa Neurons) && throw(ArgumentError(
        "structure must be Neurons with $(nameof(typeof(criterion))), which scores neurons"))
    match = contest(structure, masks, sparsity)
    structure isa Neurons && sequence(model)
    return match
end

"The same before an experiment, for the first and the last sparsity."
check_experiment(model, criterion, structure, targets) =
    foreach(s -> check_pruning(model, host_masks(model), criterion, structure, s), (first(targets), last(targets)))

function prune_silently!(model, criterion, data...; sparsity = nothing, structure = Global(), opt = nothing)
    length(data) <= 1 && all(pair -> pair isa Union{Tuple,NamedTuple} && length(pair) == 2, data) || throw(ArgumentError(
        "data must be one pair (x, y) of inputs and labels, not $(join(map(summary, data), ", "))"))
    isnothing(opt) || memories(opt, model)
    masks = host_masks(model)
    match = check_pruning(model, masks, criterion, structure, sparsity)
    steps = isnothing(match.keep) ? 1 : iterations(criterion)
    if steps == 1
        prune_step!(model, criterion, data, structure, masks, match, match.keep)
    else
        kept = [kept_at(match.units, places) for places in match.groups]
        work = deepcopy(model) # so that nothing has changed if a later step fails
        for step in 1:steps
            now = Contest(competitors(structure, masks), match.layers, match.groups, match.keep)
            keep = step == steps ? match.keep : round.(Int, kept .* (match.keep ./ max.(kept, 1)) .^ (step / steps))
            masks = prune_step!(work, criterion, data, structure, masks, now, keep)
        end
        Flux.loadmodel!(model, work)
    end
    isnothing(opt) || mask!(opt, model)
    return model
end

"Score, select, let the survivors make up for it, and mask; return the new masks."
function prune_step!(model, criterion, data, structure, masks, match, keep)
    scores = map(host_scores, prunables(model), saliency(criterion, model, data...))
    isnothing(keep) && (keep = above_cutoff(criterion, structure, scores, match))
    new = select(structure, scores, masks, match, keep)
    compensate!(criterion, model, map(native, prunables(model), masks), map(native, prunables(model), new), data...)
    return apply!(model, new)
end

function apply!(model, masks)
    foreach((layer, mask) -> copyto!(layer.mask, native(layer, mask)), prunables(model), masks)
    mask!(model)
    return masks
end

host_scores(layer, scores) = scores isa AbstractVector ? on_host(scores) : canonical(layer, scores)

"How many each group keeps if all that scores below the criterion's own cutoff goes, but for what is protected."
function above_cutoff(criterion, structure, scores, match)
    cut = cutoff(criterion)
    isnothing(cut) || structure isa Neurons && (cut = nothing)
    isnothing(cut) && throw(ArgumentError(
        "sparsity must be given with $(nameof(typeof(criterion))) and $(nameof(typeof(structure)))"))
    stays = map((score, unit) -> unit .& (score .>= cut) .| protected(score, unit, structure.min_kept), scores, match.units)
    return [kept_at(stays, places) for places in match.groups]
end

"""
    iterative_prune!(model, train, test; saliency = Magnitude(), structure = Global(),
                     schedule = Exponential(rate = 0.2, rounds = 12), finetune = Rewind(),
                     training = Training(), pretrain = true, rng = Random.default_rng()) -> history

Train `model`, then in each round of the schedule prune it, restart the survivors as `finetune` says, and train
again; with `finetune = nothing`, prune without training again. `train` and `test` are `(x, y)` pairs, `x` of
size `(features..., n)` and `y` one-hot `(classes, n)`, or iterators of such batches, as `Flux.DataLoader`; a
pair is shuffled anew in each epoch with `rng`. Every round begins with an empty optimiser memory. Criteria
that need data get the pair, or the first batch. With `pretrain = false` the dense network is not trained before it is
pruned, as criteria for networks at initialisation want it.

Returns a vector of named tuples, which is a Tables.jl table, one row for the dense network (round 0) and one
per round: `round`, `sparsity`, `nonzero` (kept weights), `loss` and `accuracy` on `test`, `layers` (the density
of each), `seconds`.

Throws `ArgumentError`, before anything is trained, for a schedule that [`sparsities`](@ref) rejects or that begins
below what is pruned already, for what does not go together, and for a `Rewind` to a step that training does not reach.

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
                          training = Training(), pretrain = true, rng::AbstractRNG = Random.default_rng())
    targets = sparsities(schedule)
    batches = as_batches(train, training.batchsize; shuffle = true, rng)
    check_restart(finetune, pretrain ? training.epochs * length(batches) : 0)
    check_experiment(model, saliency, structure, targets)
    started, data = time(), samples(train)
    origin = pretrain ? fit!(model, batches, training; copy_at = origin_step(finetune)) : deepcopy(model)
    history = [report(model, test, training, 0, started)]
    for (round, target) in enumerate(targets)
        started = time()
        prune!(model, saliency, data; sparsity = target, structure)
        restart!(finetune, model, origin, rng)
        isnothing(finetune) || fit!(model, batches, training; finetune = pretrain || round > 1 ? finetune : nothing)
        push!(history, report(model, test, training, round, started))
    end
    return history
end

"The samples that a criterion gets: all, or the first batch where they come in batches."
samples(train::Tuple{AbstractArray,AbstractArray}) = train
samples(train) = first(train)

"""
    fit!(model, batches, training; finetune = nothing, copy_at = nothing, every = 1, between! = nothing)

Train for `training.epochs` at the learning rates that `finetune` calls for, with `between!(step, opt, x, y)` after each
`every` steps, where another follows, which returns whether it changed masks; return a copy of the model as it was after
`copy_at` steps.
"""
function fit!(model, batches, training; finetune = nothing, copy_at = nothing, every = 1, between! = nothing)
    opt = Flux.setup(training.optimiser, model)
    origin, step, trained = copy_at == 0 ? deepcopy(model) : nothing, 0, trainer(model, opt)
    hold_blas()
    try
        for epoch in 1:(training.epochs)
            adjust_rate!(opt, training, rate_epoch(finetune, training, epoch))
            for (x, y) in batches
                if step > 0 && step % every == 0 && !isnothing(between!)
                    store!(trained)
                    between!(step, opt, x, y) && (trained = trainer(model, opt))
                end
                step!(training.loss, trained, opt, x, y)
                step += 1
                step == copy_at && (origin = deepcopy(store!(trained)))
            end
        end
    finally
        release_blas()
        store!(trained)
    end
    return origin
end

function report(model, test, training, round, started)
    (; loss, accuracy) = evaluate(model, test; training.loss)
    layers = prunables(model)
    return (; round, sparsity = sparsity(model), nonzero = sum(layer -> count(layer.mask), layers),
            loss, accuracy, layers = map(density, layers), seconds = time() - started)
end

"""
    gradual_prune!(model, train, test; saliency = Magnitude(), structure = Global(),
                   schedule = Polynomial(sparsity = 0.8, rounds = 10), every = nothing, training = Training(),
                   rng = Random.default_rng()) -> history

Prune inside one training run (Zhu & Gupta 2017, arXiv:1710.01878): after every `every` steps to the next sparsity of the
schedule, with the optimiser's memory going on. By default the prunings share the training evenly. Data and history are as in [`iterative_prune!`](@ref); each row is what
`every` steps of training after a pruning have made, the last one what training to its end has.

Throws `ArgumentError`, before anything is trained, for what `iterative_prune!` rejects, and if training has too few
steps for the schedule.
"""
function gradual_prune!(model, train, test; saliency = Magnitude(), structure = Global(),
                        schedule = Polynomial(sparsity = 0.8, rounds = 10), every = nothing, training = Training(),
                        rng::AbstractRNG = Random.default_rng())
    targets = sparsities(schedule)
    batches = as_batches(train, training.batchsize; shuffle = true, rng)
    steps = training.epochs * length(batches)
    every = @something every max(1, steps ÷ (length(targets) + 1))
    every >= 1 && every * length(targets) < steps || throw(ArgumentError(
        "every must be 1 to $(cld(steps, length(targets)) - 1) for $(length(targets)) prunings in $steps steps, not $every"))
    check_experiment(model, saliency, structure, targets)
    history, data, started = NamedTuple[], samples(train), time()
    tell() = push!(history, report(model, test, training, length(history), started))
    function between!(step, opt, x, y)
        step <= every * length(targets) || return false
        tell()
        started = time()
        prune!(model, saliency, data; sparsity = targets[step ÷ every], structure, opt)
        return true
    end
    fit!(model, batches, training; every, between!)
    tell()
    return identity.(history)
end
