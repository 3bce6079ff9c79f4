"""
    lottery_ticket(model, train, test; saliency = Magnitude(), structure = Layerwise(),
                   schedule = Exponential(rate = 0.2, rounds = 12), finetune = Rewind(), training = Training(),
                   init = glorot_uniform, rng = Random.default_rng()) -> Vector of named tuples

The lottery-ticket experiment (Frankle & Carbin 2019, arXiv:1803.03635): train, prune, rewind as `finetune` says, round by
round. In each round two controls are trained as the ticket is: `reinitialised`, the ticket's masks with new initial weights
from `init(rng, size...)`; and `random_masks`, the weights that the ticket is rewound to under random masks of the same density
in each layer. If the ticket is better than both, both its initial weights and its structure matter.

Returns a Tables.jl table with the columns `round`, `sparsity`, and the test accuracies `ticket`, `reinitialised`,
`random_masks`; in round 0, the dense network, they are the same.

Throws `ArgumentError`, before anything is trained, for what [`iterative_prune!`](@ref) rejects.
"""
function lottery_ticket(model, train, test; saliency = Magnitude(), structure = Layerwise(),
                        schedule = Exponential(rate = 0.2, rounds = 12), finetune::Rewind = Rewind(), training = Training(),
                        init = glorot_uniform, rng::AbstractRNG = Random.default_rng())
    targets = sparsities(schedule)
    batches = as_batches(train, training.batchsize; shuffle = true, rng)
    check_restart(finetune, training.epochs * length(batches))
    check_experiment(model, saliency, structure, targets)
    accuracy(m) = evaluate(m, test; training.loss).accuracy
    initial, data = deepcopy(model), samples(train)
    origin = fit!(model, batches, training; copy_at = origin_step(finetune))
    rewound, dense = deepcopy(origin), accuracy(model)
    table = [(; round = 0, sparsity = sparsity(model), ticket = dense, reinitialised = dense, random_masks = dense)]
    for (round, target) in enumerate(targets)
        prune!(model, saliency, data; sparsity = target, structure)
        restart!(finetune, model, origin, rng)
        reinitialised = restart!(Reinitialize(init), deepcopy(model), initial, rng)
        random_masks = with_random_masks(deepcopy(rewound), prunables(model), rand(rng, 0:typemax(Int)))
        accuracies = map((; ticket = model, reinitialised, random_masks)) do m
            fit!(m, batches, training)
            accuracy(m)
        end
        push!(table, (; round, sparsity = sparsity(model), accuracies...))
    end
    return table
end

"The model with as many weights in each layer as those of `like` have, at random."
function with_random_masks(model, like, seed)
    empty = [i for (i, layer) in enumerate(like) if !any(layer.mask)]
    foreach(layer -> fill!(layer.mask, false), prunables(model)[empty])
    rates = [1 - density(layer) for layer in like if any(layer.mask)]
    isempty(rates) && return mask!(model)
    return prune!(mask!(model), RandomSaliency(seed); sparsity = rates, structure = Layerwise(exclude = empty))
end
