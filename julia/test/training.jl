using Flux, PrunableFlux, Random, Test
import Optimisers

function labelled(rng; n = 64)
    x = randn(rng, Float32, 8, n)
    return x, Flux.onehotbatch(map(c -> argmax(c[1:3]), eachcol(x)), 1:3)
end

"The same network as plain Dense layers, trained with masks multiplied in by hand."
struct Literal
    layers::Any
    masks::Any
end
Flux.@layer Literal trainable=(layers,)
(m::Literal)(x) = foldl((x, (l, mask)) -> l.σ.((l.weight .* mask) * x .+ l.bias), zip(m.layers, m.masks); init = x)

@testset "pruned in mid-training stays 0, the others train as ever: $(nameof(typeof(rule)))" for rule in (
        Descent(0.1), Momentum(0.05, 0.9), Nesterov(0.05, 0.9), Adam(0.01), AdamW(0.01, (0.9, 0.999), 0.1), RMSProp(0.01))
    rng = Xoshiro(1)
    batch = labelled(rng)
    model = Chain(PrunableDense(8 => 16, relu), PrunableDense(16 => 3))
    opt = Flux.setup(rule, model)
    loss = Flux.logitcrossentropy
    train_masked!(loss, model, Iterators.repeated(batch, 20), opt)
    prune!(model, Magnitude(); sparsity = 0.6, opt)
    literal = Literal([deepcopy(l.dense) for l in model], [l.mask for l in model])
    literal_opt = Flux.setup(rule, literal)
    for (i, layer) in enumerate(model), name in (:weight, :bias)
        from, to = opt.layers[i].dense[name], literal_opt.layers[i][name]
        to.state = deepcopy(from.state)
    end
    losses = train_masked!(loss, model, Iterators.repeated(batch, 30), opt)
    for step in 1:30
        value, (gradient,) = Flux.withgradient(m -> loss(m(batch[1]), batch[2]), literal)
        @test value ≈ losses[step] rtol = 1e-4
        Flux.update!(literal_opt, literal, gradient)
    end
    @test losses[end] < losses[1]
    for (ours, theirs) in zip(model, literal.layers)
        @test all(iszero, ours.dense.weight[.!ours.mask])
        @test ours.dense.weight[ours.mask] ≈ theirs.weight[ours.mask] rtol = 1e-3
    end
    @test sparsity(model) ≈ 0.6 atol = 0.01
end

@testset "the optimiser's memory of pruned weights is cleared" begin
    model = Chain(PrunableDense(8 => 16, relu), PrunableDense(16 => 3))
    opt = Flux.setup(OptimiserChain(WeightDecay(1f-4), Adam(0.01)), model)
    train_masked!(Flux.logitcrossentropy, model, Iterators.repeated(labelled(Xoshiro(2)), 5), opt)
    prune!(model, Magnitude(); sparsity = 0.5, opt)
    for (i, layer) in enumerate(model)
        m, v, _ = opt.layers[i].dense.weight.state[2]
        @test all(iszero, m[.!layer.mask]) && all(iszero, v[.!layer.mask])
        @test all(!iszero, v[layer.mask])
    end
end

@testset "a rule that moves every weight still leaves the pruned ones at 0" begin
    model = prune!(Chain(PrunableDense(8 => 3)), Magnitude(); sparsity = 0.5)
    opt = Flux.setup(OptimiserChain(Descent(0.1), SignDecay(0.1), WeightDecay(0.1)), model)
    model[1].dense.weight .= 1
    train_masked!(Flux.logitcrossentropy, model, [labelled(Xoshiro(3))], opt)
    @test all(iszero, model[1].dense.weight[.!model[1].mask])
end

@testset "chains differentiated layer by layer have the same gradients" begin
    rng, tied = Xoshiro(5), PrunableDense(8 => 8, tanh)
    x, y = labelled(rng)
    for chain in (Chain(PrunableDense(8 => 6, relu), BatchNorm(6), x -> 2x, PrunableDense(6 => 3)), Chain(identity),
                  Chain(tied, Chain(tied, Dense(8 => 3))), Chain([PrunableDense(8 => 6), PrunableDense(6 => 3)]),
                  Chain(first = Dense(8 => 4), last = Parallel(+, Dense(4 => 3), Dense(4 => 3))),
                  Chain(Dense(8 => 3), x -> Flux.Zygote.dropgrad(x), Dense(3 => 3)))
        target = chain[end] === identity ? zero(x) : y
        loss(ŷ) = sum(abs2, ŷ .- target)
        expected = Flux.withgradient((m, x) -> loss(m(x)), chain, x)
        ours = Flux.withgradient((m, x) -> loss(PrunableFlux.forward(m, x)), chain, x)
        @test isequal(ours, expected)
    end
end

@testset "a loss that is not finite stops training before the step" begin
    model = Chain(PrunableDense(8 => 3))
    before = deepcopy(Flux.state(model))
    x, y = labelled(Xoshiro(4))
    @test_throws DomainError train_masked!((ŷ, y) -> NaN * sum(ŷ), model, [(x, y)], Flux.setup(Adam(), model))
    @test Flux.state(model) == before
    model = prunable(Chain(Dense(8 => 6), BatchNorm(6), Dense(6 => 3)))
    before = deepcopy(Flux.state(model))
    x[1] = NaN
    @test_throws DomainError train_masked!(Flux.logitcrossentropy, model, [(x, y)], Flux.setup(Adam(), model))
    @test Flux.state(model) == before # the running statistics, too
end

@testset "what cannot be trained is refused" begin
    model, (x, y) = Chain(PrunableDense(8 => 3)), labelled(Xoshiro(4))
    opt = Flux.setup(Adam(), model)
    for batches in ((x, y), x)
        @test_throws "batches must be an iterator" train_masked!(Flux.logitcrossentropy, model, batches, opt)
    end
    for other in (Flux.setup(Adam(), unprunable(model)), Adam(), Flux.setup(Adam(), Chain(identity, model)))
        @test_throws "opt must be what Flux.setup(rule, model) returns" train_masked!(Flux.logitcrossentropy, model, [(x, y)], other)
    end
    @test_throws ArgumentError Training(decay = 0.9, optimiser = WeightDecay())
    @test_throws ArgumentError Training(decay = -1)
    @test_throws ArgumentError Training(batchsize = 0)
    chain = Training(decay = 0.5, epochs = 2, optimiser = OptimiserChain(WeightDecay(0.1), Adam(0.25)))
    opt = Flux.setup(chain.optimiser, model)
    @test PrunableFlux.adjust_rate!(opt, chain, 2).layers[1].dense.weight.rule.opts[2].eta == 0.125
end

@testset "evaluate" begin
    model = Chain(PrunableDense(Float32[1 0; 0 1], false))
    x = Float32[2 0 1 3; 1 1 0 4]
    y = Flux.onehotbatch([1, 2, 2, 2], 1:2)
    @test evaluate(model, (x, y)).accuracy == 0.75
    @test evaluate(model, (x, y)).loss ≈ Flux.logitcrossentropy(x, y)
    @test evaluate(model, Flux.DataLoader((x, y); batchsize = 3)).loss ≈ Flux.logitcrossentropy(x, y)
    sequences = reshape(x, 2, 2, 2), reshape(y, 2, 2, 2)
    @test evaluate(model, sequences).accuracy == 0.75
    @test_throws ArgumentError evaluate(model, (x[:, 1:0], y[:, 1:0]))
end

@testset "a step is that of Optimisers, masked: $(nameof(typeof(rule)))" for rule in
        (Adam(0.01), AdamW(0.01), Momentum(0.1), OptimiserChain(WeightDecay(1f-3), Adam(0.01))), T in (Float32, Float64)
    rng = Xoshiro(1)
    make() = (T == Float64 ? f64 : f32)(prune!(mlp(Xoshiro(2), 7, 9, 4), Magnitude(); sparsity = 0.4))
    ours, theirs = make(), make()
    opts = map(model -> Flux.setup(rule, model), (ours, theirs))
    Flux.freeze!(opts[1].layers[2].dense.bias)
    Flux.freeze!(opts[2].layers[2].dense.bias)
    x, y = randn(rng, T, 7, 20), Flux.onehotbatch(rand(rng, 1:4, 20), 1:4)
    for _ in 1:30
        train_masked!(Flux.logitcrossentropy, ours, [(x, y)], opts[1])
        Optimisers.update!(opts[2], theirs, Flux.gradient(m -> Flux.logitcrossentropy(m(x), y), theirs)[1])
        mask!(theirs)
    end
    for (a, b) in zip(Flux.trainables(ours), Flux.trainables(theirs))
        @test a ≈ b rtol = 100eps(T)
    end
    @test ours[2].dense.bias == make()[2].dense.bias
end

"An optimiser that keeps the gradient as it gets it, as one of a user may."
struct Before <: Optimisers.AbstractRule end
Optimisers.init(::Before, x) = zero(x)
Optimisers.apply!(::Before, before, x, dx) = dx, 0.1f0 .* (dx .- before)

@testset "gradients in the same memory are the gradients: $(nameof(typeof(rule)))" for
        rule in (Adam(0.01), OptimiserChain(ClipNorm(1), AccumGrad(2), Momentum(0.05)), Before())
    rng = Xoshiro(1)
    twice = PrunableDense(8 => 8, tanh)
    model = Chain(twice, PrunableDense(8 => 8, relu), Dense(8 => 8), twice, PrunableDense(8 => 3))
    prune!(model, Magnitude(); sparsity = 0.2)
    other, loss = deepcopy(model), Flux.logitcrossentropy
    opt, other_opt = Flux.setup(rule, model), Flux.setup(rule, other)
    data = [labelled(rng) for _ in 1:9]
    losses = train_masked!(loss, model, data, opt)
    @test losses == [PrunableFlux.step!(loss, other, other_opt, x, y) for (x, y) in data]
    @test all(layer -> layer[1].dense.weight == layer[2].dense.weight, zip(prunables(model), prunables(other)))
end

@testset "steps give their gradients' memory to the next, and gradients after them get other memory" begin
    trained = PrunableDense(300 => 200)
    model, (x, y) = Chain(trained, PrunableDense(200 => 3)), (rand(Float32, 300, 8), Flux.onehotbatch(rand(1:3, 8), 1:3))
    loss, opt = Flux.logitcrossentropy, Flux.setup(Adam(), model)
    trainer = PrunableFlux.trainer(model, opt)
    step() = PrunableFlux.step!(loss, trainer, opt, x, y)
    step(), step()
    @test (@allocated step()) < 4 * length(trained.mask)
    gradient = Flux.gradient(m -> loss(m(x), y), model)[1].layers[1].dense.weight
    copied = copy(gradient)
    step(), step()
    @test gradient == copied
end

@testset "tied layers are updated once" begin
    layer = PrunableDense(randn(Xoshiro(1), Float32, 5, 5), true, tanh)
    model = prune!(Chain(layer, layer), Magnitude(); sparsity = 0.5)
    other = deepcopy(model)
    x, y = randn(Xoshiro(2), Float32, 5, 8), Flux.onehotbatch(mod1.(1:8, 5), 1:5)
    opts = map(m -> Flux.setup(Adam(0.01), m), (model, other))
    for _ in 1:5
        train_masked!(Flux.logitcrossentropy, model, [(x, y)], opts[1])
        Optimisers.update!(opts[2], other, Flux.gradient(m -> Flux.logitcrossentropy(m(x), y), other)[1])
    end
    @test model[1].dense.weight ≈ other[1].dense.weight
end

struct Noting <: Optimisers.AbstractRule
    seen::Vector{Any}
end
Optimisers.init(::Noting, x::AbstractArray) = nothing
Optimisers.apply!(rule::Noting, state, x, dx) = (push!(rule.seen, size(x)); (state, dx))

@testset "parameters are updated in the order of the network, as processes that exchange gradients must" begin
    model, rule = mlp(Xoshiro(1), 8, 7, 6, 5, 4, 3), Noting([])
    train_masked!(Flux.logitcrossentropy, model, [labelled(Xoshiro(2))], Flux.setup(rule, model))
    @test rule.seen == map(size, Flux.trainables(model))
end

function plain_step!(model, opt, x, y)
    gradient, = Flux.gradient(m -> Flux.logitcrossentropy(m(x), y), model)
    return Optimisers.update!(opt, model, gradient)
end
masked_step!(model, opt, x, y) = PrunableFlux.step!(Flux.logitcrossentropy, model, opt, x, y)

@testset "a masked step needs as much memory as a plain one" begin
    plain = Chain(Dense(784 => 300, relu), Dense(300 => 100, relu), Dense(100 => 10))
    model = prune!(prunable(deepcopy(plain)), Magnitude(); sparsity = 0.2)
    x, y = randn(Float32, 784, 64), Flux.onehotbatch(rand(1:10, 64), 1:10)
    bytes = map((plain_step! => plain, masked_step! => model)) do (step!, network)
        opt = Flux.setup(Adam(), network)
        step!(network, opt, x, y)
        minimum(_ -> (@allocated step!(network, opt, x, y)), 1:3)
    end
    @test bytes[2] < 1.01 * bytes[1]
end
