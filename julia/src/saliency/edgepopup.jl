"""
    EdgePopup(; sparsity = 0.5, training = Training(epochs = 20, optimiser = Adam(3.0f-3)))

Learned scores over frozen weights (Ramanujan et al. 2020, arXiv:1911.13299): a subnetwork of an untrained network that
works. In each layer the network uses the weights with the highest scores, leaving out `round(sparsity * n)` of `n`; the
gradient goes straight through to all scores, `∂L/∂s = w * ∂L/∂(w * m)`. Scores begin at `|w|` and are trained as
`training` says, over the samples in their order; weights and biases stay as they are.

Prune with it an untrained network, with [`Layerwise`](@ref) and the same sparsity.
"""
Base.@kwdef struct EdgePopup
    sparsity::Float64 = 0.5
    training::Training = Training(epochs = 20, optimiser = Adam(3.0f-3))
end

function saliency(criterion::EdgePopup, model, data)
    net = double(model)
    layers, masks = prunables(net), host_masks(net)
    unmasked = map(unpruned_mask, weights(net))
    scores = [abs.(W) for W in weights(net)]
    train_scored!(criterion.training, data, scores) do x, y
        chosen = map(native, layers, select(Layerwise(), map(canonical, layers, scores), masks, criterion.sparsity))
        subnetwork = with_weights(net, map((W, m) -> W .* m, weights(net), chosen), unmasked)
        gradients = weight_gradients(m -> criterion.training.loss(forward(m, x), y), subnetwork)
        return map((W, g) -> W .* g, weights(net), gradients)
    end
    return scores
end
