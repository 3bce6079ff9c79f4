"""
    saliency(criterion, model, [data]) -> Vector of score arrays

How much each prunable weight matters: one array per layer of [`prunables`](@ref)`(model)`, of the size of its
weight; or, from a criterion about neurons, how much each of the layer's outputs matters, in a vector. Higher is
more important. `data` is a pair `(x, y)` of inputs `(features..., n)` and one-hot labels `(classes, n)`, for criteria
that need it. All scores but those of a plain [`Magnitude`](@ref) and [`RandomSaliency`](@ref) are
computed in double precision, with layers such as `Dropout` in test mode.

A new criterion is a struct and a method of this function; masks, schedules and training are not its concern.

Throws `ArgumentError` if the criterion needs data and gets none.
"""
function saliency end

saliency(criterion, model) = needs_data(criterion)

needs_data(criterion) = throw(ArgumentError(
    "$(nameof(typeof(criterion))) needs data: a pair (x, y) of inputs and one-hot labels"))

"Whether a criterion scores neurons, for [`Neurons`](@ref), and not weights."
of_neurons(criterion) = false

"In how many steps, each scored anew, a criterion is pruned."
iterations(criterion) = 1

"The score below which all goes where no sparsity is given; `nothing` if a criterion has none."
cutoff(criterion) = nothing

"""
    compensate!(criterion, model, before, after, data...)

Change the weights of `model` that survive, and its biases, to make up for the weights that go when its masks
change from `before` to `after`. Called before they do; by default it does nothing. What it throws, it throws before it
changes anything.
"""
compensate!(criterion, model, before, after, data...) = model

"A copy of the model in double precision and test mode."
double(model) = mask!(Flux.testmode!(Flux.f64(deepcopy(model))))

"The masked gradient of `f(model)` in the weight of each prunable layer."
weight_gradients(f, model) = per_layer(only(Flux.gradient(f, model)), model)

"What the gradient of a model holds for the weight of each prunable layer; the parts of a tied layer are added up."
function per_layer(gradient, model)
    sums = IdDict{Any,Any}()
    add_parts!(sums, gradient, model)
    return [get(() -> zero(weight(layer)), sums, layer) for layer in prunables(model)]
end

function add_parts!(sums, gradient, node)
    isnothing(gradient) && return nothing
    if node isa Prunable
        part = inner(gradient, node).weight
        sums[node] = haskey(sums, node) ? sums[node] .+ part : part
    elseif gradient isa Ref # of a mutable struct
        add_parts!(sums, gradient[], node)
    else
        nodes = children(node)
        foreach(key -> add_parts!(sums, gradient[key], nodes[key]), keys(nodes))
    end
    return nothing
end

"The first `per_class` samples of each class."
function balanced((x, y), per_class)
    ndims(y) == 2 || throw(ArgumentError("data's labels must be (classes, n) for a balanced batch, not of size $(size(y))"))
    labels = onecold(Flux.cpu(y))
    found = [findall(==(class), labels) for class in axes(y, 1)]
    all(places -> length(places) >= per_class, found) || throw(ArgumentError(
        "data must hold $per_class samples of each class for a balanced batch, but holds \
         $(join(map(length, found), ", ")) of the $(length(found)) classes"))
    places = reduce(vcat, first.(found, per_class))
    return x[ntuple(_ -> :, ndims(x) - 1)..., places], y[:, places]
end

in_batches((x, y), batchsize) = DataLoader((x, y); batchsize = min(batchsize, numobs(x)))

"""
    mean_over_samples(f, model, x) -> Vector

For each prunable layer the mean over samples, and over the places where it is applied in each, of what
`f(inputs, outputs)` sums over the columns that it is given, as the network is applied to `x`. The inputs are those of one
output: of a convolution, a patch.
"""
function mean_over_samples(f, model, x)
    totals, samples = IdDict{Any,Any}(), IdDict{Any,Int}()
    function record(layer, x, y)
        inputs, outputs = columns(layer, x, y)
        part = f(inputs, outputs)
        totals[layer] = haskey(totals, layer) ? totals[layer] .+ part : part
        samples[layer] = get(samples, layer, 0) + size(outputs, 2)
        return nothing
    end
    recording = with_layers(layer -> Recorder(layer, record), model)
    for batch in DataLoader(x; batchsize = min(1024, numobs(x)))
        recording(Flux.f64(batch))
    end
    return [totals[layer] ./ samples[layer] for layer in prunables(model)]
end

columns(::PrunableDense, x, y) = reshape(x, size(x, 1), :), reshape(y, size(y, 1), :)
function columns(layer::PrunableConv, x, y)
    layer.conv.groups == 1 || throw(ArgumentError("this saliency cannot score a convolution with groups"))
    patches = NNlib.unfold(x, Flux.conv_dims(layer.conv, x)) # (places, inputs, samples)
    n = ndims(y)
    return reshape(permutedims(patches, (2, 1, 3)), size(patches, 2), :),
           reshape(permutedims(y, (n - 1, (1:(n - 2))..., n)), size(y, n - 1), :)
end

"The weights with one row per output, (outputs, inputs), as `mean_over_samples` orders the inputs; and back."
as_matrix(::PrunableDense, W) = W
as_matrix(layer::PrunableConv, W) = permutedims(reshape(W, :, size(W, ndims(W))))
from_matrix(::PrunableDense, A) = A
from_matrix(layer::PrunableConv, A) = reshape(permutedims(A), size(layer.mask))

struct Recorder{L,F}
    layer::L
    record::F
end

function (r::Recorder)(x)
    y = r.layer(x)
    r.record(r.layer, x, y)
    return y
end
Base.:*(r::Recorder, x::AbstractVecOrMat) = r(x)
Base.size(r::Recorder, dims...) = size(r.layer, dims...)
MLUtils.zeros_like(r::Recorder, dims...) = MLUtils.zeros_like(r.layer, dims...)
