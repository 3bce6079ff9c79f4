"""
    SET(; fraction = 0.3, seed = 0)

Sparse evolutionary training: random weights grow in the place of the smallest (Mocanu et al. 2018, arXiv:1707.04780).
`fraction` is the share of the kept weights that give way at first.
"""
Base.@kwdef struct SET
    fraction::Float64 = 0.3
    seed::Int = 0
end

"""
    RigL(; fraction = 0.3)

The rigged lottery: the weights with the largest gradients grow in the place of the smallest (Evci et al. 2020,
arXiv:1911.11134). `fraction` is the share of the kept weights that give way at first.
"""
Base.@kwdef struct RigL
    fraction::Float64 = 0.3
end

"Of each layer, how promising the weights are that are pruned now: the highest grow."
growth(method::SET, model, batch, loss) = saliency(RandomSaliency(method.seed), model)
function growth(::RigL, model, (x, y), loss)
    net, inputs = double(model), Flux.f64(x)
    unmasked = with_weights(net, weights(net), map(unpruned_mask, weights(net)))
    return map(g -> abs.(g), weight_gradients(m -> loss(forward(m, inputs), y), unmasked))
end

"""
    regrow!(method, model, batch; fraction = method.fraction, opt = nothing, loss = logitcrossentropy)

In each layer with `k` kept and `p` pruned weights, prune the `min(round(fraction * k), p)` kept weights of the least
magnitude, and keep from now on as many of the `p` instead, those that `method` chooses; they begin at 0. Equal scores
are settled by position, as in [`PrunableFlux.select`](@ref), the first being dropped and the first growing. The
optimiser state `opt` forgets both. This is the one operation in which masks gain entries.

Throws `ArgumentError`, with masks and weights as they were, unless `fraction` is in [0, 1], and if weights or what `method` goes
by are NaN.
"""
function regrow!(method, model, batch; fraction = method.fraction, opt = nothing, loss = logitcrossentropy)
    check_fraction(fraction)
    isnothing(opt) || memories(opt, model)
    mask!(model)
    masks = host_masks(model)
    layers = prunables(model)
    scores = zip(map(canonical, layers, map(W -> abs.(W), weights(model))),
                 map(canonical, layers, growth(method, model, batch, loss)))
    new = map(masks, scores) do mask, (magnitude, promise)
        any_nan(magnitude, mask) && throw(ArgumentError("model has weights that are NaN, which cannot be ranked"))
        any_nan(promise, .!mask) && throw(ArgumentError("the batch gives gradients that are NaN, which cannot be ranked"))
        n = min(round(Int, fraction * count(mask)), count(!, mask))
        stay, stay_out = copy(mask), .!mask
        drop_lowest!([stay], [magnitude], n)
        drop_lowest!([stay_out], [-promise], n)
        stay, .!mask .& .!stay_out
    end
    apply!(model, first.(new))
    isnothing(opt) || mask!(opt, model) # forgets the dropped, and, of the growing, what it may have kept
    foreach((layer, (stay, grown)) -> copyto!(layer.mask, native(layer, stay .| grown)), layers, new)
    return model
end

"""
    sparse_train!(model, train; method = RigL(), every = 100, stop = 0.75, training = Training(),
                  rng = Random.default_rng())

Train `model` at its present sparsity, and let weights move: [`regrow!`](@ref) after every `every` steps, in the first
`stop` of all steps, with the next batch, and a fraction that falls from `method.fraction` to 0 along a half cosine.
Prune first, for example `prune!(model, RandomSaliency(); sparsity = 0.9, structure = ERK())`.
"""
function sparse_train!(model, train; method = RigL(), every = 100, stop = 0.75, training = Training(),
                       rng::AbstractRNG = Random.default_rng())
    every >= 1 || throw(ArgumentError("every must be at least 1, not $every"))
    0 <= stop <= 1 || throw(ArgumentError("stop must be in [0, 1], not $stop"))
    check_fraction(method.fraction)
    batches = as_batches(train, training.batchsize; shuffle = true, rng)
    last_step = stop * training.epochs * length(batches)
    function between!(step, opt, x, y)
        step < last_step || return false
        fraction = method.fraction * (1 + cospi(step / last_step)) / 2
        regrow!(anew(method, rng), model, (x, y); fraction, opt, training.loss)
        return true
    end
    fit!(model, batches, training; every, between!)
    return model
end

check_fraction(fraction) =
    0 <= fraction <= 1 || throw(ArgumentError("fraction must be in [0, 1], not $fraction"))

"The method with other random numbers."
anew(method::SET, rng) = SET(method.fraction, rand(rng, 0:typemax(Int)))
anew(method, rng) = method
