# What the Python package calls. Arrays arrive as views of NumPy's memory and are used in place unless a comment
# says that they are copied. A row-major (samples, features) array, transposed on the Python side, is Julia's
# (features, samples).
module PrunableFluxPythonCallExt

using Flux: Flux, Chain, Dense, logitcrossentropy, onehotbatch
using MLUtils: BatchView, obsview
using NNlib: NNlib
using Optimisers: Optimisers
using PrunableFlux: PrunableFlux, PrunableDense, evaluate, mask!, prune!, prunables, saliency, step!, zero_pruned!
using PythonCall: PyArray

const ACTIVATIONS = (identity = identity, relu = NNlib.relu, tanh = tanh, sigmoid = NNlib.sigmoid)

"A Julia array on the memory of a contiguous NumPy array, valid while the NumPy array lives."
borrow(x::PyArray) = unsafe_wrap(Array, pointer(x), size(x))

# NumPy holds weights row-major, Julia column-major: this is a copy.
layer(weight, mask, bias, activation) = PrunableDense(
    Dense(Matrix{Float32}(weight), isnothing(bias) ? false : Vector{Float32}(bias), ACTIVATIONS[Symbol(activation)]),
    Matrix{Bool}(mask))

network(layers...) = Chain(layers...)

"The arrays of each layer, for Python to view: (weight, mask, bias or nothing)."
parameters(model) = map(prunables(model)) do layer
    (; weight, bias) = layer.dense
    (zero_pruned!(weight, layer.mask), layer.mask, bias isa Bool ? nothing : bias)
end

function load!(model, arrays...)
    for ((weight, mask, bias), l) in zip(arrays, prunables(model))
        copyto!(l.dense.weight, weight)
        copyto!(l.mask, mask)
        isnothing(bias) || copyto!(l.dense.bias, bias)
    end
    mask!(model)
    return nothing
end

choice(name, fields) = choice(Symbol(name), NamedTuple(Symbol(k) => v for (k, v) in fields))
choice(name::Symbol, fields::NamedTuple) =
    getproperty(isdefined(PrunableFlux, name) ? PrunableFlux : Optimisers, name)(; fields...)

forward(model, x::PyArray) = GC.@preserve x model(borrow(x))

labels(model, y::Array) = onehotbatch(y, 0:(size(last(prunables(model)).dense.weight, 1) - 1))

score(model, x::PyArray, y::PyArray) = GC.@preserve x y begin
    target = borrow(y)
    (; loss, accuracy) = evaluate(model, (borrow(x), labels(model, target)))
    (loss, accuracy)
end

function loss_and_gradients(model, x::PyArray, y::PyArray)
    GC.@preserve x y begin
        input, target = borrow(x), labels(model, borrow(y))
        loss, (gradient,) = Flux.withgradient(m -> logitcrossentropy(m(input), target), model)
    end
    return loss, [(g.dense.weight, g.dense.bias) for g in gradient.layers]
end

scores(model, criterion) = saliency(criterion, model)

setup(model, rule) = Flux.setup(rule, model)

prune(model, criterion, sparsity, structure, opt) = (prune!(model, criterion; sparsity, structure, opt); nothing)

"A training run over given batches that can be left and taken up again between two steps."
mutable struct Steps{M,L,O,B,X,Y}
    const model::M
    const layers::L
    const opt::O
    const batches::B
    const losses::Vector{Float32}
    const owners::Tuple{X,Y} # NumPy arrays whose memory the batches read
    done::Int
end

function Steps(model, opt, x::PyArray, y::PyArray, order::PyArray, batchsize)
    positions = Int.(order) .+ 1
    batches = BatchView(obsview((borrow(x), labels(model, borrow(y))), positions); batchsize, partial = true)
    return Steps(model, prunables(model), opt, batches, zeros(Float32, length(batches)), (x, y), 0)
end

"Take steps until all are done or `seconds` have passed; return how many are done."
function advance!(steps::Steps, seconds)
    (; model, layers, opt, batches, losses) = steps
    deadline = time() + seconds
    while steps.done < length(batches)
        x, y = batches[steps.done + 1]
        losses[steps.done + 1] = step!(logitcrossentropy, model, layers, opt, x, y)
        steps.done += 1
        time() < deadline || break
    end
    return steps.done
end

end
