"""
    OBD(; exact = false, loss = logitcrossentropy)

Optimal brain damage: `h * w^2 / 2`, the second-order change of the loss when `w` is deleted, with `h = ∂²L/∂w²`
(LeCun, Denker & Solla 1990). `h` comes from LeCun's backward recursion over the diagonal in its Levenberg–Marquardt
form, which leaves out the second derivatives of the activations,

    h_ij = E[d_i x_j²],   d = σ′(a)² .* (W .^ 2)ᵀ d of the layer above,   p (1 - p) at the softmax,

for a `Chain` of prunable layers and softmax cross-entropy. With `exact`, from the diagonal of the Hessian of any
`loss` itself, for networks of at most 20,000 parameters.

Throws `ArgumentError` for other networks, and for another `loss` without `exact`.
"""
Base.@kwdef struct OBD
    exact::Bool = false
    loss::Any = logitcrossentropy
    function OBD(exact, loss)
        exact || loss === logitcrossentropy || throw(ArgumentError(
            "OBD's loss must be logitcrossentropy without exact = true, not $loss: the recursion is of no other"))
        return new(exact, loss)
    end
end

function saliency(criterion::OBD, model, (x, y))
    net, x = double(model), Flux.f64(x)
    diagonal = criterion.exact ? hessian_diagonal(m -> criterion.loss(forward(m, x), y), net) : lecun_diagonal(perceptron(net), x)
    return map((W, h) -> h .* W .^ 2 ./ 2, weights(net), diagonal)
end

const LARGEST_EXACT = 20_000
const LARGEST_FULL = 5_000

function lecun_diagonal(layers, x)
    inputs, activations = trace(layers, x)
    p = NNlib.softmax(last(inputs))
    d, n = p .* (1 .- p), size(p, 2)
    diagonal = [zero(weight(layer)) for layer in layers]
    for l in reverse(eachindex(layers))
        (; weight, σ) = layers[l].dense
        d = slope.(σ, activations[l]) .^ 2 .* d
        diagonal[l] .= d * (inputs[l] .^ 2)' ./ n
        d = (weight .^ 2)' * d
    end
    return diagonal
end

"The inputs of each layer, and the outputs of the last, and the weighted sums in each before its activation."
function trace(layers, x)
    inputs, activations = [reshape(x, :, numobs(x))], AbstractMatrix[]
    for (; dense) in layers
        push!(activations, dense.weight * last(inputs) .+ dense.bias)
        push!(inputs, dense.σ.(last(activations)))
    end
    return inputs, activations
end

slope(σ, a) = ForwardDiff.derivative(σ, a)
slope(::typeof(NNlib.relu), a) = a > 0 ? one(a) : zero(a) # 0 at 0, as in the gradient

function hessian_diagonal(f, model)
    parameters = sum(length, Flux.trainables(model))
    parameters <= LARGEST_EXACT || throw(ArgumentError(
        "an exact OBD is for networks of at most $LARGEST_EXACT parameters, not $parameters"))
    diagonal = map(zero, weights(model))
    for (l, W) in enumerate(weights(model)), places in Iterators.partition(eachindex(W), CHUNK)
        tangents = [map(w -> Dual(w, ZEROS), V) for V in weights(model)]
        foreach((k, i) -> tangents[l][i] = Dual(W[i], ntuple(==(k), CHUNK)), eachindex(places), places)
        gradient = weight_gradients(f, with_duals(model, tangents))[l]
        foreach((k, i) -> diagonal[l][i] = partials(gradient[i], k), eachindex(places), places)
    end
    return diagonal
end

const CHUNK = 8 # columns of the Hessian in one pass
const ZEROS = ntuple(_ -> 0.0, CHUNK)

"""
    OBS(; full = false, damping = 0.01, iterations = 10)

Optimal brain surgeon: `w^2 / (2 [H⁻¹]_qq)`, the second-order change of the loss when `w` is deleted and all others
make up for it, which they then do: survivors `K` change by `H_KK⁻¹ H_KP w_P` when `P` are deleted (Hassibi & Stork
1993). By layer, `H = E[x xᵀ]`, the Hessian of the mean squared change of the layer's weighted sums halved, which all
its outputs share (Frantar & Alistarh 2022, arXiv:2208.11580); the cost grows with the cube of the number of weights that
an output keeps. With `full`, the Gauss–Newton matrix of softmax cross-entropy in all weights and biases together, for a
`Chain` of prunable layers with at most 5,000 of them. `damping` times the mean of its diagonal is added to the diagonal
of `H`. Pruned in `iterations` steps, the density falling exponentially, with `H` computed anew in each.

Throws `ArgumentError` if `H` is singular, which `damping` prevents, and for networks that `full` does not fit.
"""
Base.@kwdef struct OBS
    full::Bool = false
    damping::Float64 = 0.01
    iterations::Int = 10
end

iterations(criterion::OBS) = criterion.iterations

function saliency(criterion::OBS, model, (x, y))
    net = double(model)
    masks = [layer.mask for layer in prunables(net)]
    if criterion.full
        H = damped(gauss_newton(net, masks, x), criterion.damping)
        diagonals, _ = split_parameters(net, masks, diag(inv(factor(H, "the network"))))
    else
        diagonals = map(enumerate(second_moments(net, x)), prunables(net)) do (l, H), layer
            rows = rows_of_inverse(damped(H, criterion.damping), as_matrix(layer, layer.mask), "the $(ordinal(l)) layer")
            from_matrix(layer, rows)
        end
    end
    return map((W, d, mask) -> ifelse.(mask, W .^ 2 ./ (2 .* d), 0.0), weights(net), diagonals, masks)
end

function compensate!(criterion::OBS, model, before, after, (x, y))
    net = double(model)
    if criterion.full
        H = damped(gauss_newton(net, before, x), criterion.damping)
        kept = join_parameters(net, before, after, map(layer -> trues(size(layer.mask, 1)), prunables(net)))
        θ = join_parameters(net, before, weights(net), biases(net))
        change = zero(θ)
        change[kept] = factor(H[kept, kept], "the network") \ (H[kept, .!kept] * θ[.!kept])
        changes, shifts = split_parameters(net, before, change)
    else
        changes = map(enumerate(second_moments(net, x)), prunables(net), before, after) do (l, H), layer, old, new
            rows = map(A -> as_matrix(layer, A), (weight(layer), old, new))
            from_matrix(layer, changes_of_rows(damped(H, criterion.damping), rows..., "the $(ordinal(l)) layer"))
        end
        shifts = map(zero, biases(net))
    end
    foreach(prunables(model), changes, shifts) do layer, change, shift
        weight(layer) .+= change
        bias(layer) === false || (bias(layer) .+= shift)
    end
    return model
end

second_moments(model, x) = map(Array, mean_over_samples((x, _) -> x * x', model, x))

damped(H, damping) = H + damping * (tr(H) / size(H, 1)) * I

function factor(H, what)
    F = cholesky(Symmetric(H); check = false)
    smallest = issuccess(F) ? minimum(abs2, diag(F.U); init = Inf) : 0.0
    smallest > eps() * size(H, 1) * maximum(diag(H); init = 0.0) || size(H, 1) == 0 || throw(ArgumentError(
        "the curvature that OBS uses is singular in $what; a larger damping mends that, unless its inputs are all 0"))
    return F
end

"For each weight that its row keeps, its place in the diagonal of the inverse of the row's part of `H`."
function rows_of_inverse(H, mask, what)
    inverses = Dict{BitVector,Vector{Float64}}() # rows that keep the same share one
    diagonal = zeros(size(mask))
    for (row, kept) in zip(eachrow(diagonal), map(BitVector, eachrow(mask)))
        row[kept] = get!(() -> diag(inv(factor(H[kept, kept], what))), inverses, kept)
    end
    return diagonal
end

function changes_of_rows(H, W, before, after, what)
    change = zeros(size(W))
    for i in axes(W, 1)
        kept, gone = BitVector(after[i, :]), BitVector(before[i, :] .& .!after[i, :])
        any(gone) || continue
        change[i, kept] = factor(H[kept, kept], what) \ (H[kept, gone] * W[i, gone])
    end
    return change
end

biases(model) = [bias(layer) === false ? zeros(0) : bias(layer) for layer in prunables(model)]

"One vector of the entries of `arrays` where `masks` keep and of `vectors`, layer by layer."
join_parameters(model, masks, arrays, vectors) = reduce(vcat, (
    vcat(array[mask], bias(layer) === false ? similar(vector, 0) : vector)
    for (layer, mask, array, vector) in zip(prunables(model), masks, arrays, vectors)))

"The inverse of [`join_parameters`](@ref), 0 where nothing is kept."
function split_parameters(model, masks, θ)
    at = 0
    parts = map(prunables(model), masks) do layer, mask
        W = zeros(size(mask))
        W[mask] = θ[at .+ (1:count(mask))]
        b = θ[(at + count(mask)) .+ (1:(bias(layer) === false ? 0 : size(mask, 1)))]
        at += count(mask) + length(b)
        W, b
    end
    return first.(parts), last.(parts)
end

"""
    gauss_newton(model, masks, x) -> Matrix

`E[Jᵀ (diag(p) - p pᵀ) J]`, `J` the Jacobian of the outputs in the kept weights and the biases, `p` their softmax.
"""
function gauss_newton(model, masks, x)
    layers = perceptron(model)
    parameters = sum(count, masks) + sum(length, biases(model))
    parameters <= LARGEST_FULL || throw(ArgumentError(
        "a full OBS is for networks of at most $LARGEST_FULL kept parameters, not $parameters"))
    G = zeros(parameters, parameters)
    for batch in DataLoader(x; batchsize = min(512, numobs(x)))
        inputs, activations = trace(layers, Flux.f64(batch))
        root = sqrt.(NNlib.softmax(last(inputs)))
        for class in axes(root, 1) # a column of a square root of diag(p) - p pᵀ
            d = ((axes(root, 1) .== class) .- root .* root[class:class, :]) .* root
            parts = Matrix{Float64}[]
            for l in reverse(eachindex(layers))
                d = slope.(layers[l].dense.σ, activations[l]) .* d
                at = findall(Array(masks[l]))
                part = d[first.(Tuple.(at)), :] .* inputs[l][last.(Tuple.(at)), :]
                pushfirst!(parts, bias(layers[l]) === false ? part : vcat(part, d))
                d = weight(layers[l])' * d
            end
            columns = reduce(vcat, parts)
            mul!(G, columns, columns', 1 / numobs(x), 1)
        end
    end
    return G
end
