"""
    Wanda()

`|w_ij| * ‖x_j‖₂`, the norm of input `j` over the samples (Sun, Liu, Bair & Kolter 2023, arXiv:2306.11695), who let
weights compete within each output: [`PerOutput`](@ref). For a convolution, the norm of the mean over the places.
"""
struct Wanda end

function saliency(::Wanda, model, (x, y))
    net = double(model)
    means = mean_over_samples((x, _) -> sum(abs2, x; dims = 2), net, x)
    return map(prunables(net), means) do layer, m
        from_matrix(layer, abs.(as_matrix(layer, weight(layer))) .* sqrt.(numobs(x) .* m'))
    end
end

"""
    Activation(; zeros = false)

Of neurons: mean `|a|` over the samples; with `zeros`, the share of samples in which `a` is not 0, which is 1 - APoZ, the
average percentage of zeros (Hu, Peng, Tai & Tang 2016, arXiv:1607.03250).
"""
Base.@kwdef struct Activation
    zeros::Bool = false
end

of_neurons(::Activation) = true

function saliency(criterion::Activation, model, (x, y))
    measure = criterion.zeros ? !iszero : abs
    return map(vec, mean_over_samples((_, a) -> sum(measure, a; dims = 2), double(model), x))
end

"""
    Redundancy(; activations = false)

Of neurons: what is lost when another neuron of the layer takes over. Neuron `j` is replaced by `α` times neuron `i`
plus `β`; its outgoing weights `v_j` go to `i`, `α`-fold, and `β v_j` to the next bias (Srinivas & Babu 2015,
arXiv:1507.06149).

By default the incoming weights decide: with `u` the incoming weights and the bias, the cost is
`‖u_j - α u_i‖² ‖v_j‖²` and `β = 0`; `α` is the best `α ≥ 0` where the activation is `relu` or `identity`, and 1 otherwise.
With `activations`, `α` and `β` are the regression of `a_j` on `a_i` over the samples, and the cost is its mean squared error
times `‖v_j‖²`. The cheapest replacement goes first, so that of duplicates, which cost nothing, one stays.

For a `Chain` of prunable layers and the structure [`Neurons`](@ref).
"""
Base.@kwdef struct Redundancy
    activations::Bool = false
end

of_neurons(::Redundancy) = true

function saliency(criterion::Redundancy, model, data = nothing)
    criterion.activations && isnothing(data) && needs_data(criterion)
    net = double(model)
    layers = perceptron(net)
    scores = map(greedy_order, replacements(criterion, net, data), living([layer.mask for layer in layers]))
    return push!(scores, fill(Inf, size(last(layers).mask, 1)))
end

function compensate!(criterion::Redundancy, model, before, after, data = nothing)
    net = double(model)
    pairs = replacements(criterion, net, data)
    for (next, old, pair, was, is) in zip(prunables(model)[2:end], weights(net)[2:end], pairs, living(before), living(after))
        any(is) || continue
        for j in findall(was .& .!is)
            i = argmin(i -> pair.cost[j, i], findall(is))
            weight(next)[:, i] .+= pair.α[j, i] .* old[:, j]
            bias(next) === false || (bias(next) .+= pair.β[j, i] .* old[:, j])
        end
    end
    return model
end

"For each hidden layer, at `[j, i]`: the `cost`, `α` and `β` of replacing neuron `j` by neuron `i`."
function replacements(criterion, net, data)
    layers = perceptron(net)
    moments = criterion.activations ?
        mean_over_samples((_, a) -> hcat(a * a', sum(a; dims = 2)), net, first(data)) : layers
    return [begin
        fit = criterion.activations ? by_activations(moment, bias(next) !== false) : by_weights(layer)
        (; fit.α, fit.β, cost = fit.error .* vec(sum(abs2, weight(next); dims = 1)))
    end for (layer, next, moment) in zip(layers, layers[2:end], moments)]
end

function by_weights(layer)
    (; weight, bias, σ) = layer.dense
    u = bias === false ? weight : hcat(weight, bias)
    products, squares = u * u', sum(abs2, u; dims = 2)
    α = σ === identity || σ === NNlib.relu ? max.(0, ratio.(products, squares')) : ones(size(products))
    return (; α, β = zero(α), error = lost.(squares .- 2 .* α .* products .+ α .^ 2 .* squares', squares))
end

function by_activations(moment, intercept)
    products, means = moment[:, 1:(end - 1)], intercept ? moment[:, end] : zeros(size(moment, 1))
    covariance = products .- means .* means'
    variance = lost.(diag(covariance), diag(products))
    α = ratio.(covariance, variance')
    return (; α, β = means .- α .* means', error = lost.(variance .- α .* covariance, variance))
end

ratio(a, b) = iszero(b) ? zero(a) : a / b

"What is lost of `whole`: 0 where it is nothing but rounding error."
lost(part, whole) = part > 1e-12 * whole ? part : zero(part)

"The cost at which each neuron goes when always the cheapest goes next; `Inf` for the last."
function greedy_order((; cost), alive)
    scores, left, spent = zeros(length(alive)), findall(alive), 0.0
    while length(left) > 1
        price, j = minimum((cost[j, i], j) for j in left for i in left if i != j)
        spent = max(spent, price)
        scores[j] = spent
        filter!(!=(j), left)
    end
    scores[left] .= Inf
    return scores
end
