# What the Python package calls. NumPy arrays come as the address of their memory and their sizes, which needs no
# compilation in the user's session, and are used in place unless a comment says that they are copied. A row-major
# (samples, features) array is Julia's (features, samples). Python keeps an array alive while Julia may read it.
module PrunableFluxPythonCallExt

using Flux: Flux, BatchNorm, Chain, Conv, Dense, MaxPool, MeanPool, logitcrossentropy, onehotbatch, testmode!
using MLUtils: getobs, mapobs
using NNlib: NNlib
using Optimisers: Optimisers
using PrecompileTools: @compile_workload, @setup_workload
using PrunableFlux: PrunableFlux, Prunable, PrunableConv, PrunableDense, SparseNetwork, canonical, evaluate, features, flipped,
                    hold_blas, host_scores, inner, mask!, prunables, prune_silently!, release_blas, saliency, step!, store!, trainer,
                    unprunable, zero_pruned!
using PythonCall: Py, pybuiltins, pyconvert, pygetattr

const ACTIVATIONS = (identity = identity, relu = NNlib.relu, tanh = tanh, sigmoid = NNlib.sigmoid)

borrow(::Type{T}, address, dims...) where {T} = unsafe_wrap(Array, Ptr{T}(UInt(address)), map(Int, dims))

# Row-major in NumPy, column-major here: weights and masks are copied, both ways.
rows(::Type{T}, address, outputs, inputs) where {T} = permutedims(borrow(T, address, inputs, outputs))
rows(::Type{T}, address, outputs, inputs, height, width) where {T} =
    flipped(borrow(T, address, width, height, inputs, outputs))

vector(address, n) = copy(borrow(Float32, address, n))
given_bias(address, n) = iszero(address) ? false : vector(address, n)

dense(outputs, inputs, weight, mask, bias, activation) = PrunableDense(
    Dense(rows(Float32, weight, outputs, inputs), given_bias(bias, outputs), ACTIVATIONS[Symbol(activation)]),
    rows(Bool, mask, outputs, inputs))

conv(outputs, inputs, height, width, weight, mask, bias, activation, stride, pad, dilation) = PrunableConv(
    Conv(rows(Float32, weight, outputs, inputs, height, width), given_bias(bias, outputs), ACTIVATIONS[Symbol(activation)];
         stride, pad, dilation),
    rows(Bool, mask, outputs, inputs, height, width))

batchnorm(n, weight, bias, mean, variance, activation, epsilon, momentum) =
    BatchNorm(ACTIVATIONS[Symbol(activation)], map(at -> vector(at, n), (bias, weight, mean, variance))...,
              Float32(epsilon), Float32(momentum), true, true, nothing, n)

pool(kind, size, stride, pad) = (kind == "max" ? MaxPool : MeanPool)(size; stride, pad)

flatten() = Flux.flatten

# A vector, not a tuple, of layers: one type for perceptrons of every depth, so that all of them are precompiled.
network(parts...) = Chain(all(part -> part isa PrunableDense, parts) ? PrunableDense[parts...] : Any[parts...])

outputs(model) = size(last(model.layers).mask, 1)
outputs(network::SparseNetwork) = PrunableFlux.outputs(network)

weight(model, i) = zero_pruned!(PrunableFlux.weight(model[i]), model[i].mask)
mask(model, i) = model[i].mask
bias(model, i) = PrunableFlux.bias(model[i])

const NORM = Dict("weight" => :γ, "bias" => :β, "mean" => :μ, "variance" => :σ²)
norm(model, i, name) = getfield(model[i], NORM[name])

load!(model, i, addresses...) = (load!(model[i], addresses...); nothing)
load!(part) = part
function load!(layer::Prunable, weight, mask, bias)
    sizes = size(canonical(layer, layer.mask))
    copyto!(PrunableFlux.weight(layer), rows(Float32, weight, sizes...))
    copyto!(layer.mask, rows(Bool, mask, sizes...))
    iszero(bias) || copyto!(PrunableFlux.bias(layer), borrow(Float32, bias, first(sizes)))
    return mask!(layer)
end
function load!(part::BatchNorm, addresses...)
    foreach((to, at) -> copyto!(to, borrow(Float32, at, part.chs)), (part.γ, part.β, part.μ, part.σ²), addresses)
    return part
end

"The struct of this name with these fields, whether a choice of PrunableFlux or a rule of Optimisers."
choice(name; fields...) =
    getproperty(isdefined(PrunableFlux, Symbol(name)) ? PrunableFlux : Optimisers, Symbol(name))(; fields...)

samples(model, x, sizes, y, n) =
    borrow(Float32, x, sizes..., n), onehotbatch(borrow(Int64, y, n), 0:(outputs(model) - 1))

forward(model, x, sizes, n) = model(borrow(Float32, x, sizes..., n))

score(model, data...) = values(evaluate(model, samples(model, data...)))

function loss_and_gradients(model, data...)
    input, target = samples(model, data...)
    testmode!(model)
    loss, (gradient,) = Flux.withgradient(m -> logitcrossentropy(PrunableFlux.forward(m, input), target), model)
    testmode!(model, :auto)
    return loss, [begin
        (; weight, bias) = inner(g, layer)
        canonical(layer, weight), bias
    end for (layer, g) in zip(model.layers, gradient.layers) if layer isa Prunable]
end

setup(model, rule) = Flux.setup(rule, model)
adjust(opt, eta) = (Optimisers.adjust!(opt, eta); nothing)

"Samples for a criterion, which may be none; an image of zeros then tells those that need to know their size."
function given(model, x, sizes, y, n)
    iszero(n) || return (samples(model, x, sizes, y, n),)
    return length(sizes) == 1 ? () : ((zeros(Float32, sizes..., 1), onehotbatch([0], 0:(outputs(model) - 1))),)
end

scores(model, criterion, data...) =
    map(host_scores, prunables(model), saliency(criterion, model, given(model, data...)...))

# Python gives the warning about layers without weights itself.
function prune(model, criterion, sparsity, structure, opt, data...)
    prune_silently!(model, criterion, given(model, data...)...; sparsity, structure, opt)
    return nothing
end

function regrow(model, method, fraction, opt, data...)
    PrunableFlux.regrow!(method, model, samples(model, data...); fraction, opt)
    return nothing
end

compact(model) = network(PrunableFlux.compact(model).layers...)

sparsify(model, kernels, sizes) = PrunableFlux.sparsify(
    model; kernels = kernels isa AbstractString ? Symbol(kernels) : map(Symbol, collect(kernels)), input_size = sizes)

address(network) = UInt(pointer_from_objref(network))

infer!(network, y, x, n) =
    PrunableFlux.infer!(borrow(Float32, y, outputs(network), n), network, borrow(Float32, x, features(network), n))

function infer_at(network, y, x, n)
    try
        return Cint(infer!(unsafe_pointer_to_objref(network)::SparseNetwork, y, x, n))
    catch
        return Cint(-1)
    end
end

"""
The address of a C function `int (network, y, x, n)` that writes the outputs for `n` samples at `x` to `y` and returns whether
the inputs are finite, or -1 if something was thrown. Its arguments need no conversion, which takes longer than a small network.
"""
infer_function() = UInt(@cfunction(infer_at, Cint, (Ptr{Cvoid}, Ptr{Float32}, Ptr{Float32}, Csize_t)))

"A training run over given batches that can be left and taken up again between two steps."
mutable struct Steps{T,O,B}
    const trained::T
    const opt::O
    const batches::B
    const losses::Vector{Float32}
    done::Int
end

function Steps(trained, model, opt, data...)
    given = batches(model, data...)
    return Steps(trained, opt, given, zeros(Float32, length(given)), 0)
end

function batches(model, x, sizes, y, n, order, visited, batchsize)
    data = samples(model, x, sizes, y, n)
    parts = Iterators.partition(borrow(Int64, order, visited) .+ 1, batchsize)
    return mapobs(part -> getobs(data, part), collect(parts))
end

"Take steps until all are done or `seconds` have passed; return how many are done."
function advance!(steps::Steps, seconds)
    (; trained, opt, batches, losses) = steps
    deadline = time() + seconds
    hold_blas()
    try
        while steps.done < length(batches)
            x, y = batches[steps.done + 1]
            losses[steps.done + 1] = step!(logitcrossentropy, trained, opt, x, y)
            steps.done += 1
            time() < deadline || break
        end
    finally
        release_blas()
        store!(trained)
    end
    return steps.done
end

# For comparison, the same as plain Flux does it, without masks.
plain(model) = unprunable(deepcopy(model))
train_plain!(plain, opt, model, data...) =
    Flux.train!((m, x, y) -> logitcrossentropy(m(x), y), plain, batches(model, data...), opt)

# What Python calls, in its order, through Python, so that conversions are compiled too: layers of all kinds between a first
# and a last one that are the usual, since how gradients reach a layer depends on what follows it.
@setup_workload begin
    x, y, order = rand(Float32, 192), repeat(0:2, 4), collect(0:11)
    w, m, b, fast = rand(Float32, 144), fill(true, 144), rand(Float32, 16), zeros(Float32, 3, 12)
    at(array) = Int(pointer(array))
    @compile_workload GC.@preserve x y order w m b fast begin
        bridge, view = Py(@__MODULE__), pybuiltins.memoryview
        bridge.seval("Threads.nthreads()")
        dense_part(outputs, inputs, σ) = bridge.dense(outputs, inputs, at(w), at(m), at(b), σ)
        conv_part(outputs, inputs, bias, σ) =
            bridge.conv(outputs, inputs, 3, 3, at(w), at(m), bias, σ, (1, 1), (1, 1), (1, 1))
        perceptrons = map((("relu", "relu"), ("tanh", "sigmoid"))) do hidden
            bridge.network((dense_part(4, 4, σ) for σ in hidden)..., dense_part(3, 4, "identity"))
        end
        images = bridge.network(
            conv_part(2, 1, at(b), "relu"), bridge.pool("max", (2, 2), (2, 2), (0, 0)), conv_part(4, 2, 0, "identity"),
            bridge.batchnorm(4, at(b), at(b), at(b), at(b), "relu", 1e-5, 0.1), bridge.pool("max", (2, 2), (2, 2), (0, 0)),
            bridge.flatten(), dense_part(4, 4, "relu"), dense_part(3, 4, "identity"))
        for (model, sizes, place) in ((perceptrons[1], 4, 3), (perceptrons[2], 4, 3), (images, (4, 4, 1), 8))
            data = (at(x), sizes, at(y), 12)
            pygetattr(bridge, "load!")(model, place, at(w), at(m), at(b))
            foreach(view, (bridge.weight(model, 1), bridge.mask(model, 1), bridge.bias(model, 1)))
            opt = bridge.setup(model, bridge.choice("Adam"; beta = (0.9, 0.999), eta = 0.01, epsilon = 1e-8))
            trained = bridge.trainer(model, opt, nothing)
            steps = bridge.Steps(trained, model, opt, data..., at(order), 12, 5)
            pygetattr(bridge, "advance!")(steps, 0.2), length(steps.losses), view(steps.losses)
            view(bridge.forward(model, at(x), sizes, 12))
            bridge.score(model, data...), bridge.loss_and_gradients(model, data...)
            model === perceptrons[2] && continue
            for (structure, sparsity) in (("Layerwise", 0.2), ("Global", 0.6))
                bridge.prune(model, bridge.choice("Magnitude"), sparsity, bridge.choice(structure), opt, 0, sizes, 0, 0)
            end
            trained = bridge.trainer(model, opt, trained)
            trained = bridge.trainer(model, opt, trained)
            pygetattr(bridge, "advance!")(bridge.Steps(trained, model, opt, data..., at(order), 12, 5), 0.2)
            for name in ("Magnitude", "Taylor", "SynFlow", "Wanda")
                view(bridge.scores(model, bridge.choice(name), data...)[0])
            end
        end
        model = first(perceptrons)
        bridge.scores(model, bridge.choice("OBD"), at(x), 4, at(y), 12)
        for (model, sizes) in ((model, 4), (images, (4, 4, 1)))
            sparse = bridge.sparsify(model, "auto", sizes)
            bridge.infer_function()
            place = Ptr{Cvoid}(pyconvert(UInt, bridge.address(sparse)))
            GC.@preserve sparse foreach(n -> infer_at(place, pointer(fast), pointer(x), n % Csize_t), (1, 12))
        end
    end
end

end
