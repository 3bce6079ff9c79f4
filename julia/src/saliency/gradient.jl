"""
    Taylor(; squared = true, batchsize = 60, loss = logitcrossentropy)

First-order change of the loss when a weight is deleted: the mean of `(g * w)^2`, or without `squared` of `|g * w|`,
over batches of `batchsize` consecutive samples; `g` is the gradient of a batch's mean loss (Molchanov et al. 2019,
arXiv:1906.10771, equations 4 and 8).
"""
Base.@kwdef struct Taylor
    squared::Bool = true
    batchsize::Int = 60
    loss::Any = logitcrossentropy
end

function saliency(criterion::Taylor, model, data)
    net, measure = double(model), criterion.squared ? abs2 : abs
    batches = in_batches(Flux.f64(data), criterion.batchsize)
    return sum(batches) do (x, y)
        gradients = weight_gradients(m -> criterion.loss(forward(m, x), y), net)
        map((W, g) -> measure.(g .* W), weights(net), gradients)
    end ./ length(batches)
end

"""
    SNIP(; per_class = 10, loss = logitcrossentropy)

Connection sensitivity `|g * w|` on one balanced batch, the first `per_class` samples of each class (Lee, Ajanthan & Torr
2019, arXiv:1810.02340). Made for networks that are not trained yet.

Throws `ArgumentError` if the data hold fewer samples of a class.
"""
Base.@kwdef struct SNIP
    per_class::Int = 10
    loss::Any = logitcrossentropy
end

function saliency(criterion::SNIP, model, data)
    batch = balanced(data, criterion.per_class)
    return saliency(Taylor(false, criterion.per_class * size(batch[2], 1), criterion.loss), model, batch)
end

"""
    GraSP(; per_class = 10, temperature = 200, loss = logitcrossentropy)

Preserved gradient flow, `w * (H g)`: `H` is the Hessian and `g` the gradient of the loss in the prunable weights, the
outputs divided by `temperature`, on one balanced batch, the first `per_class` samples of each class (Wang, Zhang &
Grosse 2020, arXiv:2002.07376). The paper's `S = -w * (H g)` says how much gradient flow grows when `w` is deleted,
and the largest `S` go first. Not for recurrent layers.

Throws `ArgumentError` if the data hold fewer samples of a class.
"""
Base.@kwdef struct GraSP
    per_class::Int = 10
    temperature::Float64 = 200
    loss::Any = logitcrossentropy
end

function saliency(criterion::GraSP, model, data)
    net = double(model)
    x, y = balanced(Flux.f64(data), criterion.per_class)
    loss(m) = criterion.loss(forward(m, x) ./ criterion.temperature, y)
    products = hessian_product(loss, net, weight_gradients(loss, net))
    return map((W, p) -> W .* p, weights(net), products)
end

"The Hessian of `f(model)` in all prunable weights times one direction: forward over reverse differentiation."
function hessian_product(f, model, direction)
    tangents = map((W, d) -> Dual.(W, d), weights(model), direction)
    return map(g -> partials.(g, 1), weight_gradients(f, with_duals(model, tangents)))
end

"The model with dual numbers for weights, and without `Dropout`, which knows no random ones."
function with_duals(model, duals)
    isdropout(x) = x isa Flux.Dropout
    still = fmap(x -> isdropout(x) ? identity : x, model; exclude = x -> isdropout(x) || islayer(x))
    return with_weights(still, duals)
end

"""
    Movement(; training = Training(epochs = 1))

`-Σ w * g` over the steps of fine-tuning: weights that move away from 0 matter (Sanh, Wolf & Rush 2020,
arXiv:2005.07683). A copy of the network is fine-tuned as `training` says, over the samples in their order, and discarded.
"""
Base.@kwdef struct Movement
    training::Training = Training(epochs = 1)
end

function saliency(criterion::Movement, model, data)
    net = Flux.testmode!(double(model), :auto)
    scores = map(zero, weights(net))
    train_scored!(criterion.training, data, net) do x, y
        gradient, = Flux.gradient(m -> criterion.training.loss(forward(m, x), y), net)
        foreach((s, W, g) -> s .-= W .* g, scores, weights(net), per_layer(gradient, net))
        return gradient
    end
    return scores
end

"Train `parameters` over the samples in their order, with the gradients that `gradient(x, y)` gives."
function train_scored!(gradient, training, data, parameters)
    opt = Flux.setup(training.optimiser, parameters)
    for epoch in 1:(training.epochs)
        adjust_rate!(opt, training, epoch)
        for (x, y) in in_batches(Flux.f64(data), training.batchsize)
            Optimisers.update!(opt, parameters, gradient(x, y))
            mask!(parameters)
        end
    end
    return parameters
end
